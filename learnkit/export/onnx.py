"""ONNX files with their description in the metadata, whose last entry is the hash of the file."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from learnkit.checkpoint.files import Damaged

HASH = "sha256"
LARGEST = 2**31 - 2**20  # bytes: protobuf's limit, minus room for what is added


def onnx_bytes(model: nn.Module, example: tuple[Tensor, ...], said: dict[str, Any]) -> bytes:
    """Return a model with a variable batch size as an ONNX file, with `said` in its metadata."""
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
            f"the model has {proto.ByteSize() / 1e9:.1f} GB, expected less than 2 GB for an ONNX file. Export to a "
            f"file ending in .pt2."
        )
    return sealed_onnx(proto.SerializeToString())


def sealed_onnx(data: bytes) -> bytes:
    return data + entry(hashlib.sha256(data).hexdigest())


def entry(digest: str) -> bytes:
    """Return one more metadata_props entry of a ModelProto (field 14). Every reader merges concatenated messages."""
    pair = field(1, HASH.encode()) + field(2, digest.encode())
    return field(14, pair)


def field(number: int, value: bytes) -> bytes:
    """Return a protobuf field of less than 128 bytes."""
    assert len(value) < 128
    return bytes([number << 3 | 2, len(value)]) + value


def check_onnx(path: Path) -> bytes:
    """Return the bytes of a file, after checking that it ends in the hash of all bytes before."""
    data = path.read_bytes()
    n = len(data) - len(entry("0" * 64))
    if n <= 0 or data[n:] != entry(hashlib.sha256(data[:n]).hexdigest()):
        raise Damaged(
            f"{path} does not end in the hash of its bytes: it is incomplete, was changed after it was written, or was "
            f"not written by learn.export. Nothing was loaded."
        )
    return data


def session_of(path: Path) -> Any:
    """Return an ONNX Runtime session on the CPU."""
    return required("onnxruntime").InferenceSession(check_onnx(path), providers=["CPUExecutionProvider"])


def required(name: str) -> Any:
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(
            f"ONNX needs {name}, which is not installed: install the extra 'onnx' of this library."
        ) from error
