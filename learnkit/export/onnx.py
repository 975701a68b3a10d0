"""ONNX files with what they are in their metadata, and their own hash as the last entry of it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from learnkit.checkpoint.files import Damaged

HASH = "sha256"
LARGEST = 2**31 - 2**20  # bytes: protobuf's limit, less what is added


def onnx_bytes(model: nn.Module, example: tuple[Tensor, ...], said: dict[str, Any]) -> bytes:
    """A model with the batch's size left open, and `said` in its metadata."""
    for name in ("onnx", "onnxscript", "onnxruntime"):
        required(name)
    names = [entry["name"] for entry in said["inputs"]]
    program: Any = torch.onnx.export(
        model,
        example,
        dynamo=True,
        input_names=names,
        verbose=False,
        dynamic_shapes=(tuple({0: torch.export.Dim("batch")} for _ in example),),
    )
    proto = program.model_proto
    proto.metadata_props.add(key="learnkit", value=json.dumps(said))
    if proto.ByteSize() > LARGEST:
        raise ValueError(
            f"the model has {proto.ByteSize() / 1e9:.1f} GB, and one ONNX file holds 2. Export to a file ending in "
            f".pt2."
        )
    return sealed_onnx(proto.SerializeToString())


def sealed_onnx(data: bytes) -> bytes:
    return data + entry(hashlib.sha256(data).hexdigest())


def entry(digest: str) -> bytes:
    """One more metadata_props of a ModelProto (field 14): messages that are put one after another are merged by every
    reader.
    """
    pair = field(1, HASH.encode()) + field(2, digest.encode())
    return field(14, pair)


def field(number: int, value: bytes) -> bytes:
    """A protobuf field of less than 128 bytes."""
    assert len(value) < 128
    return bytes([number << 3 | 2, len(value)]) + value


def check_onnx(path: Path) -> bytes:
    """The bytes of a file that ends in the hash of all that comes before."""
    data = path.read_bytes()
    n = len(data) - len(entry("0" * 64))
    if n <= 0 or data[n:] != entry(hashlib.sha256(data[:n]).hexdigest()):
        raise Damaged(
            f"{path} does not end in the hash of its bytes: it was cut off, changed after it was written, or written "
            f"by something else than learn.export. Nothing was loaded."
        )
    return data


def session_of(path: Path) -> Any:
    """ONNX Runtime's session, on the CPU."""
    return required("onnxruntime").InferenceSession(check_onnx(path), providers=["CPUExecutionProvider"])


def required(name: str) -> Any:
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(
            f"ONNX needs {name}, which is not installed: it is in the extra 'onnx' of this library."
        ) from error
