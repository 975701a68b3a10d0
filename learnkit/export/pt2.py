"""torch.export's archives, written without pickles, and read only after all of their content was checked.

torch.export.load trusts its file: it unpickles example inputs, evaluates expressions of sizes, and calls functions by
their names. Therefore `check_archive` accepts only tensors, numbers, names and torch's own operators: what
`archive_bytes` writes.
"""

from __future__ import annotations

import io
import json
import re
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch.export.passes import move_to_device_pass

from learnkit.checkpoint.files import SEAL, Damaged, check_seal

MEMBERS = re.compile(
    r"(models/model\.json|data/(weights/(weight_\d+|model_weights_config\.json)|constants/(tensor_\d+|"
    r"model_constants_config\.json)|sample_inputs/model\.pt)|extra/[\w.]+|archive_format|archive_version|byteorder|"
    r"\.data/(version|serialization_id|alignment)|\.format_version|\.storage_alignment)"
)
NODE_NAME = re.compile(r"[\w.\-]*")  # of nodes, parameters and similar objects
OPERATOR = re.compile(
    r"torch\.ops\.(aten|prims|torchvision)\.(?!from_file)\w+\.\w+|torch\.sym_\w+|math\.(ceil|floor|sqrt|trunc)|"
    r"_operator\.(add|sub|mul|truediv|floordiv|mod|pow|neg|getitem|eq|ne|lt|le|gt|ge|and_|or_)"
)
EXPRESSION = re.compile(
    r"(?:Symbol\('[su]\d+'(?:, (?:positive|nonnegative|integer)=True)*\)|[su]\d|"
    r"Integer|Rational|Add|Mul|Pow|Max|Min|Mod|FloorDiv|CleanDiv|PythonMod|TrueDiv|IntTrueDiv|FloorToInt|CeilToInt|floor|ceiling|Equality|Unequality|Eq|Ne|"
    r"[-+*/(),<>= \d])*"
)  # of sizes, as sympy writes them
CONTAINERS = ("builtins.tuple", "builtins.list", "builtins.dict", "collections.OrderedDict", None)


# --- writing -----------------------------------------------------------------
def archive_bytes(program: torch.export.ExportedProgram, extra: dict[str, str]) -> bytes:
    """Return the sealed archive of a program, without its example inputs and its record of the source code."""
    program._example_inputs = None  # type: ignore[assignment]
    program._guards_code = []  # guards are Python code; the operators check sizes
    for node in program.graph.nodes:
        for name in ("stack_trace", "nn_module_stack", "source_fn_stack", "torch_fn", "from_node", "custom"):
            node.meta.pop(name, None)
    buffer = io.BytesIO()
    torch.export.save(program, buffer, extra_files=extra)
    return sealed_archive(buffer.getvalue())


def sealed_archive(archive: bytes) -> bytes:
    """Return a zip file with its own hash as its comment.

    The last two bytes of a zip file are the comment's length, which is 0 before.
    """
    import hashlib

    comment = SEAL + hashlib.sha256(archive).hexdigest().encode()
    return archive[:-2] + len(comment).to_bytes(2, "little") + comment


# --- reading -----------------------------------------------------------------
def read_archive(path: Path, device: torch.device) -> tuple[torch.nn.Module, dict[str, str]]:
    """Return (the model on `device`, the extra texts) of an archive.

    Nothing in the file is executed; an invalid file raises Damaged.
    """
    extra = check_archive(path)
    found = dict.fromkeys(extra, "")
    try:
        with path.open("rb") as file:
            program = torch.export.load(file, extra_files=found)
    except Exception as error:
        raise Damaged(f"{path} is an archive of torch.export that this torch cannot read: {error}") from error
    if device.type != "cpu":
        program = move_to_device_pass(program, device)
    return program.module(check_guards=False), extra


def check_archive(path: Path) -> dict[str, str]:
    """Return the extra texts of an archive, after checking that all of its content is what `archive_bytes` writes."""
    check_seal(path)
    try:
        with zipfile.ZipFile(path) as archive:
            files = {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}
            tops = {name.partition("/")[0] for name in archive.namelist()}
            if len(files) != len(archive.namelist()) or len(tops) != 1:
                raise Damaged(f"{path} contains two files with the same name.")
    except (zipfile.BadZipFile, OSError, EOFError, NotImplementedError, RuntimeError) as error:
        raise Damaged(f"{path} is not an archive of torch.export: {error}") from None
    try:
        check_members(files)
        check_graph(json.loads(files["models/model.json"]))
    except Refused as refused:
        raise Damaged(
            f"{path} contains {refused}, which learn.export does not write: nothing was loaded. If you trust the file, "
            f"use torch.export.load, which may execute its content."
        ) from None
    except (ValueError, KeyError, RecursionError, AttributeError, TypeError) as error:
        raise Damaged(f"{path} is not an archive of torch.export: {error!r}") from None
    return {name.removeprefix("extra/"): text.decode() for name, text in files.items() if name.startswith("extra/")}


class Refused(Exception):
    """What was found and is not allowed."""


def check_members(files: dict[str, bytes]) -> None:
    for name in files:
        if not MEMBERS.fullmatch(name):
            raise Refused(f"a member {name!r}")
    for kind in ("weights", "constants"):
        for name, entry in json.loads(files[f"data/{kind}/model_{kind}_config.json"])["config"].items():
            if entry["use_pickle"] or not re.fullmatch(r"(weight|tensor)_\d+", entry["path_name"]):
                raise Refused(f"a pickled {name}")
    sample = files.get("data/sample_inputs/model.pt", b"")
    if not sample:
        return
    try:
        torch.load(io.BytesIO(sample), weights_only=True)
    except Exception:
        raise Refused("example inputs that are not plain tensors") from None


def check_graph(value: Any, key: str = "") -> None:
    """Check every string in the description of the graph, by its key."""
    if isinstance(value, dict):
        for name, part in value.items():
            if not NODE_NAME.fullmatch(name):
                raise Refused(f"the name {name!r}")
            check_graph(part, name)
    elif isinstance(value, list):
        if key == "guards_code" and value:
            raise Refused("Python code")
        for part in value:
            check_graph(part, key)
    elif isinstance(value, str):
        check_text(value, key)


def check_text(text: str, key: str) -> None:
    if key in ("in_spec", "out_spec"):
        return check_containers(json.loads(text) if text else None)
    if key == "torch_version":
        pattern = re.compile(r"[\w.+]*")
    else:
        pattern = {"target": OPERATOR, "expr_str": EXPRESSION}.get(key, NODE_NAME)
    if not pattern.fullmatch(text):
        raise Refused(f"{key} {text[:60]!r}")


def check_containers(value: Any) -> None:
    """Check the structure of arguments and results, as torch.utils._pytree writes it."""
    if isinstance(value, dict):
        if value.get("type") not in CONTAINERS:
            raise Refused(f"a structure of {value.get('type')!r}")
        for part in value.get("children_spec", []):
            check_containers(part)
    elif isinstance(value, list):
        for part in value:
            check_containers(part)
