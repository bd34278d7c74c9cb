"""Writes a DeepSeek-V3 folder as one GGUF file, which llama.cpp and Ollama run."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFWriter, LlamaFileType
from gguf.quants import quantize

from smolseek.checkpoint.atomic import atomic_file, begins_with, refuse_existing
from smolseek.checkpoint.folder import TensorFolder
from smolseek.checkpoint.source import read_config, resolve_folder
from smolseek.export.keys import ARCHITECTURE, add_keys
from smolseek.export.tensors import ExportTensor, export_tensors
from smolseek.export.vocabulary import add_vocabulary
from smolseek.formats.deepseek_v3 import with_defaults
from smolseek.formats.runtimes import check, verdict

GgufType = Literal["f32", "f16", "bf16", "q8_0"]
_FILE_TYPES = {
    "f32": LlamaFileType.ALL_F32,
    "f16": LlamaFileType.MOSTLY_F16,
    "bf16": LlamaFileType.MOSTLY_BF16,
    "q8_0": LlamaFileType.MOSTLY_Q8_0,
}
_QUANTISATION_VERSION = 2
_FALLBACK = GGMLQuantizationType.F16
_LARGEST_F16 = float(np.finfo(np.float16).max)


@dataclass(frozen=True)
class GgufExport:
    """A written GGUF file.

    `fallbacks` names the tensors written as f16 because their row length is no multiple of the type's block size.
    """

    path: Path
    size_bytes: int
    tensors: int
    fallbacks: tuple[str, ...]
    has_chat_template: bool


def export_gguf(
    folder: str | Path,
    out: str | Path,
    *,
    type: GgufType = "f16",
    pre: str | None = None,
    force: bool = False,
    on_tensor: Callable[[int, int], None] = lambda done, count: None,
) -> GgufExport:
    """Writes a folder as a GGUF file.

    Only one tensor (or one projection of a layer's experts) is in memory at a time. An interrupted or failed export
    leaves no file.

    Args:
        pre: llama.cpp's name for the tokenizer's pre-tokenization; needed only if it is not recognised.
        on_tensor: called with (tensors done, tensors in all).

    Raises:
        ValueError: the folder is no checkpoint, or `runtimes.check` says that llama.cpp refuses it; its tokenizer is of
            no known kind; a number does not fit `type`; `out` exists and `force` is not set, or is no GGUF file.
        OSError: `out` cannot be written, for example because the disk is full.
    """
    source, out = resolve_folder(folder), Path(out)
    _check_out(out, source, force)
    config, tensors = read_config(source), TensorFolder(source)
    if config.get("tie_word_embeddings") and tensors.has_own_head():
        config["tie_word_embeddings"] = False  # as transformers loads it
    findings = check(config, tensors.headers)["llama.cpp"]
    if any(finding.refuses for finding in findings):
        raise ValueError(f"checkpoint {folder}: llama.cpp {verdict(findings)}")
    config = with_defaults(config)
    planned = [(tensor, encoding_of(tensor, type)) for tensor in export_tensors(tensors, config)]
    writer = GGUFWriter(None, ARCHITECTURE)
    add_keys(writer, config, source.resolve().name)
    writer.add_file_type(_FILE_TYPES[type])
    writer.add_quantization_version(_QUANTISATION_VERSION)
    has_chat_template = add_vocabulary(writer, source, config["vocab_size"], pre=pre)
    try:
        with atomic_file(out, force=force) as path, contextlib.closing(writer):
            _write_tensors(writer, path, planned, on_tensor)
    except OSError as error:
        raise OSError(f"{out}: cannot be written ({error.strerror or error})") from error
    fallbacks = tuple(tensor.name for tensor, encoding in planned if encoding != wanted_encoding(tensor, type))
    return GgufExport(out, out.stat().st_size, len(planned), fallbacks, has_chat_template)


def _check_out(out: Path, source: Path, force: bool) -> None:
    """Raises ValueError if `out` is no file to write, or writing it would destroy something else than a GGUF file."""
    folder = next(parent for parent in out.absolute().parents if parent.exists())
    if not folder.is_dir():
        raise ValueError(f"{out}: {folder} is a file and no folder; name another")
    if out.is_dir():
        raise ValueError(f"{out}: is a folder; name a file")
    refuse_existing(out, force)
    if out.exists() and not begins_with(out, b"GGUF"):
        raise ValueError(f"{out}: is no GGUF file, and --force replaces only those; name another")
    if out.suffix != ".gguf" and out.absolute().parent.resolve() == source.resolve():
        raise ValueError(f"{out}: may be taken for a file of the checkpoint in that folder; end the name in .gguf")


def wanted_encoding(tensor: ExportTensor, type: GgufType) -> GGMLQuantizationType:
    """Returns the encoding that `type` asks for, whatever the length of the tensor's rows."""
    return GGMLQuantizationType.F32 if tensor.keeps_fp32 else GGMLQuantizationType[type.upper()]


def encoding_of(tensor: ExportTensor, type: GgufType) -> GGMLQuantizationType:
    """Returns the wanted encoding, or f16 if the tensor's row length is no multiple of the encoding's block size."""
    wanted = wanted_encoding(tensor, type)
    return wanted if tensor.shape[-1] % GGML_QUANT_SIZES[wanted][0] == 0 else _FALLBACK


def _write_tensors(
    writer: GGUFWriter,
    path: Path,
    planned: list[tuple[ExportTensor, GGMLQuantizationType]],
    on_tensor: Callable[[int, int], None],
) -> None:
    """Writes the header, the keys, the list of tensors and then the tensors one by one."""
    for tensor, encoding in planned:
        block, block_bytes = GGML_QUANT_SIZES[encoding]
        size = int(np.prod(tensor.shape)) // block * block_bytes
        writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), size, raw_dtype=encoding)
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    assert writer.fout is not None
    (file,) = writer.fout
    for done, (tensor, encoding) in enumerate(planned, start=1):
        data = _encode(tensor, encoding)
        writer.write_padding(file, file.tell())
        file.write(data.data)  # not by `write_tensor_data`, whose errors do not say why a write failed
        writer.write_padding(file, data.nbytes)
        on_tensor(done, len(planned))


def _encode(tensor: ExportTensor, encoding: GGMLQuantizationType) -> np.ndarray:
    """Returns the encoded bytes of one tensor; raises ValueError if a number is too large for f16."""
    numbers = np.ascontiguousarray(tensor.read().numpy())
    largest = float(np.abs(numbers).max(initial=0))
    if encoding == GGMLQuantizationType.F16 and largest > _LARGEST_F16:
        raise ValueError(f"tensor {tensor.name}: {largest:.3g} is beyond f16's largest number; use --type bf16 or f32")
    return quantize(numbers, encoding)
