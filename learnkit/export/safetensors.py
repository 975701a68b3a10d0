"""safetensors files of a model's state, in plain Python: a JSON header, then the bytes of the tensors.

Format: https://github.com/huggingface/safetensors#format. Every reader of the format can read them; `__metadata__` has
the file's description, and the hash of everything else.
"""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from learnkit.checkpoint.files import Damaged
from learnkit.devices.staging import packed

DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
LARGEST_HEADER = 100_000_000  # bytes; the limit of the format's own reader


def safetensors_bytes(tensors: dict[str, Tensor], said: dict[str, Any]) -> bytes:
    header, parts, place = {}, [], 0
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPES:
            raise TypeError(f"{name} is {tensor.dtype}, which a safetensors file cannot store.")
        data = packed(tensor.cpu()).numpy().tobytes()
        header[name] = {
            "dtype": DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [place, place + len(data)],
        }
        parts.append(data)
        place += len(data)
    body, text = b"".join(parts), json.dumps(said)
    header["__metadata__"] = {"learnkit": text, "sha256": digest_of_file(header, text, body)}
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)  # tensors start at a multiple of 8 bytes
    return len(head).to_bytes(8, "little") + head + body


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return (tensors, the file's description); raise Damaged if the file is not valid."""
    data = path.read_bytes()
    try:
        n = int.from_bytes(data[:8], "little")
        if not 2 <= n <= min(LARGEST_HEADER, len(data) - 8):
            raise ValueError("its header is longer than the file")
        header, body = json.loads(data[8 : 8 + n]), data[8 + n :]
        own = header.pop("__metadata__", {})
        if own.get("sha256") != digest_of_file(header, own.get("learnkit", ""), body):
            raise ValueError("its hash differs, or another program wrote it")
        return {name: tensor_of(entry, body) for name, entry in header.items()}, json.loads(own["learnkit"])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, RuntimeError) as error:
        raise Damaged(
            f"{path} is not a complete safetensors file of learn.export: {error}. Nothing was loaded."
        ) from None


def tensor_of(entry: dict[str, Any], body: bytes) -> Tensor:
    dtype = next(dtype for dtype, name in DTYPES.items() if name == entry["dtype"])
    start, stop = entry["data_offsets"]
    if not 0 <= start <= stop <= len(body) or stop - start != math.prod(entry["shape"]) * dtype.itemsize:
        raise ValueError("a tensor is outside of the file")
    if start == stop:
        return torch.empty(entry["shape"], dtype=dtype)
    return torch.frombuffer(bytearray(body[start:stop]), dtype=dtype).reshape(entry["shape"])


def digest_of_file(header: dict[str, Any], text: str, body: bytes) -> str:
    found = hashlib.sha256(json.dumps([header, text], sort_keys=True).encode())
    found.update(body)
    return found.hexdigest()
