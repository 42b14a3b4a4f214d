"""GGUF files, the format of llama.cpp and Ollama, through the package gguf."""

import torch

from utils.cli import die


def library():
    try:
        import gguf  # an extra: nothing else here needs it
    except ImportError:
        die("GGUF files are read by the package gguf, which is missing; `pip install gguf`")
    return gguf


def read(path):
    """({key: value} of the metadata, {name: tensor still quantized}) of a GGUF file."""
    try:
        reader = library().GGUFReader(path)
    except OSError as e:
        die(f"{path}: cannot be read ({e.strerror}); check the path")
    fields = {key: field.contents() for key, field in reader.fields.items()}
    return fields, {tensor.name: tensor for tensor in reader.tensors}


def dequantize(tensor):
    """A tensor of read() in float32, in the shape of a weight: (out, in) or (C,)."""
    numbers = library().quants.dequantize(tensor.data, tensor.tensor_type)
    return torch.tensor(numbers, dtype=torch.float32)
