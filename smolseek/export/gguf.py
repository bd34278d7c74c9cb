"""Writes a DeepSeek-V3 folder as one GGUF file, which llama.cpp and Ollama run."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFWriter, LlamaFileType
from gguf.quants import quantize

from smolseek.checkpoint.atomic import atomic_file, begins_with, refuse_existing, remove_leftovers
from smolseek.checkpoint.folder import TensorFolder
from smolseek.checkpoint.source import commit_of, read_config, resolve_folder
from smolseek.export.keys import ARCHITECTURE, add_keys
from smolseek.export.kquants import BASES, SUBSTITUTES, mixed_encoding, quantise_rows, quantiser
from smolseek.export.tensors import ExportTensor, export_tensors
from smolseek.export.vocabulary import add_vocabulary
from smolseek.formats.deepseek_v3 import with_defaults
from smolseek.formats.runtimes import check, llama_cpp_options, verdict

GgufType = Literal["f32", "f16", "bf16", "q8_0", "q6_k", "q5_k_m", "q4_k_m"]
_FILE_TYPES = {
    "f32": LlamaFileType.ALL_F32,
    "f16": LlamaFileType.MOSTLY_F16,
    "bf16": LlamaFileType.MOSTLY_BF16,
    "q8_0": LlamaFileType.MOSTLY_Q8_0,
    "q6_k": LlamaFileType.MOSTLY_Q6_K,
    "q5_k_m": LlamaFileType.MOSTLY_Q5_K_M,
    "q4_k_m": LlamaFileType.MOSTLY_Q4_K_M,
}
_QUANTISATION_VERSION = 2
_FALLBACK = GGMLQuantizationType.F16
_WIDE = {GGMLQuantizationType.F32, GGMLQuantizationType.BF16}
_LARGEST_F16 = float(np.finfo(np.float16).max)

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class GgufExport:
    """A written GGUF file.

    `fallbacks` names the tensors written in another encoding than the type's, because its block size does not divide
    the length of their rows; `fallback_encodings` names these encodings. `bits_per_weight` is of all tensors.
    """

    path: Path
    size_bytes: int
    tensors: int
    bits_per_weight: float
    fallbacks: tuple[str, ...]
    fallback_encodings: tuple[str, ...]
    has_chat_template: bool
    options: tuple[str, ...] = ()
    """What llama.cpp's commands must say besides the file."""


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
    leaves no file; what a killed one leaves is removed by the next to `out`.

    Args:
        pre: llama.cpp's name for the tokenizer's pre-tokenization; needed only if it is not recognised.
        on_tensor: called with (tensors done, tensors in all).

    Raises:
        ValueError: the folder is no checkpoint, or `runtimes.check` says that llama.cpp refuses it; its tokenizer is of
            no known kind; a number does not fit `type`; a k-quant is asked for and xllamacpp is not installed; `out`
            exists and `force` is not set, or is no GGUF file.
        OSError: `out` cannot be written, for example because the disk is full.
    """
    source, out = resolve_folder(folder), Path(out)
    _check_out(out, source, force)
    config, tensors = _read_checkpoint(folder, source)
    if type in BASES:
        quantiser()  # raises before anything is written
    planned = [_Plan.of(tensor, type, config) for tensor in export_tensors(tensors, config)]
    writer = GGUFWriter(None, ARCHITECTURE)
    add_keys(writer, config, _name(folder, source))
    writer.add_file_type(_FILE_TYPES[type])
    writer.add_quantization_version(_QUANTISATION_VERSION)
    has_chat_template = add_vocabulary(writer, source, config["vocab_size"], pre=pre)
    remove_leftovers(out.parent, out.name)
    try:
        with atomic_file(out, force=force) as path, contextlib.closing(writer):
            _write_tensors(writer, path, planned, on_tensor)
    except OSError as error:
        raise OSError(f"{out}: cannot be written ({error.strerror or error})") from error
    if options := llama_cpp_options(config):
        log.warning("%s: no GGUF file holds YaRN's betas: run llama.cpp with %s, not Ollama", out, " ".join(options))
    fallen = [plan for plan in planned if plan.encoding != plan.wanted]
    if type in BASES and fallen:
        _warn_of_fallen(out, type, planned, len(fallen))
    return GgufExport(
        path=out,
        size_bytes=out.stat().st_size,
        tensors=len(planned),
        bits_per_weight=_bits_per_weight((plan.tensor, plan.encoding) for plan in planned),
        fallbacks=tuple(plan.tensor.name for plan in fallen),
        fallback_encodings=tuple(dict.fromkeys(plan.encoding.name.lower() for plan in fallen)),
        has_chat_template=has_chat_template,
        options=tuple(options),
    )


def _name(folder: str | Path, source: Path) -> str:
    """Returns the model's name: its folder's, or that on the hub, whose folder has the name of a commit."""
    return source.resolve().name if Path(folder).exists() else Path(commit_of(folder)[0]).name


def _read_checkpoint(folder: str | Path, source: Path) -> tuple[dict[str, Any], TensorFolder]:
    """Returns the whole config of a folder that llama.cpp loads, and its tensors; raises ValueError for another."""
    config, tensors = read_config(source), TensorFolder(source)
    if config.get("tie_word_embeddings") and tensors.has_own_head():
        config["tie_word_embeddings"] = False  # as transformers loads it
    findings = check(config, tensors.headers)["llama.cpp"]
    if any(finding.refuses for finding in findings):
        raise ValueError(f"checkpoint {folder}: llama.cpp {verdict(findings)}")
    return with_defaults(config), tensors


def _warn_of_fallen(out: Path, type: GgufType, planned: list[_Plan], fallen: int) -> None:
    """Say what tensors cost that could not be written in the encoding of a k-quant."""
    bits = _bits_per_weight((plan.tensor, plan.encoding) for plan in planned)
    meant = _bits_per_weight((plan.tensor, plan.wanted) for plan in planned)
    log.warning(
        "%s: %.2f bits per weight, where %s would take %.2f if 256 divided all rows; %d of %d tensors have others",
        *(out, bits, type, meant, fallen, len(planned)),
    )


def _check_out(out: Path, source: Path, force: bool) -> None:
    """Raises ValueError if `out` is no file to write, or writing it would destroy something else than a GGUF file."""
    folder = next(parent for parent in out.absolute().parents if parent.exists())
    if not folder.is_dir():
        raise ValueError(f"{out}: {folder} is a file and no folder; name another")
    if out.is_dir():
        raise ValueError(f"{out}: is a folder; name a file")
    if out.exists() and not begins_with(out, b"GGUF"):
        raise ValueError(f"{out}: is no GGUF file, and --force replaces only those; name another")
    refuse_existing(out, force)
    if out.suffix != ".gguf" and out.absolute().parent.resolve() == source.resolve():
        raise ValueError(f"{out}: may be taken for a file of the checkpoint in that folder; end the name in .gguf")


@dataclass(frozen=True)
class _Plan:
    """One tensor, the encoding that the file's type asks for, and the one that its rows allow."""

    tensor: ExportTensor
    wanted: GGMLQuantizationType
    encoding: GGMLQuantizationType

    @classmethod
    def of(cls, tensor: ExportTensor, type: GgufType, config: dict[str, Any]) -> _Plan:
        wanted = _wanted_encoding(tensor, type, config)
        return cls(tensor, wanted, fitting_encoding(wanted, tensor.shape[-1]))


def _wanted_encoding(tensor: ExportTensor, type: GgufType, config: dict[str, Any]) -> GGMLQuantizationType:
    """Returns the encoding that `type` asks for, whatever the length of the tensor's rows."""
    if tensor.keeps_fp32:
        return GGMLQuantizationType.F32
    if type in BASES:
        return mixed_encoding(type, tensor.name, config)
    return GGMLQuantizationType[type.upper()]


def fitting_encoding(wanted: GGMLQuantizationType, columns: int) -> GGMLQuantizationType:
    """Returns the wanted encoding, or, if its block size does not divide `columns`, blocks of 32; or else f16."""
    for encoding in (wanted, SUBSTITUTES.get(wanted, _FALLBACK)):
        if columns % GGML_QUANT_SIZES[encoding][0] == 0:
            return encoding
    return _FALLBACK


def _bits_per_weight(tensors: Iterable[tuple[ExportTensor, GGMLQuantizationType]]) -> float:
    """Returns the mean over all numbers of the tensors in these encodings."""
    pairs = list(tensors)
    numbers = sum(math.prod(tensor.shape) for tensor, _ in pairs)
    return 8 * sum(_encoded_bytes(tensor, encoding) for tensor, encoding in pairs) / numbers


def _encoded_bytes(tensor: ExportTensor, encoding: GGMLQuantizationType) -> float:
    """Returns the size of an encoded tensor; a fraction if the encoding's block size does not divide its rows."""
    block, block_bytes = GGML_QUANT_SIZES[encoding]
    return math.prod(tensor.shape) * block_bytes / block


def _write_tensors(
    writer: GGUFWriter,
    path: Path,
    planned: list[_Plan],
    on_tensor: Callable[[int, int], None],
) -> None:
    """Writes the header, the keys, the list of tensors and then the tensors one by one."""
    for plan in planned:
        tensor, encoding = plan.tensor, plan.encoding
        size = int(_encoded_bytes(tensor, encoding))
        writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), size, raw_dtype=encoding)
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    assert writer.fout is not None
    (file,) = writer.fout
    for done, plan in enumerate(planned, start=1):
        data = _encode(plan.tensor, plan.encoding)
        writer.write_padding(file, file.tell())
        file.write(data.data)  # not by `write_tensor_data`, whose errors do not say why a write failed
        writer.write_padding(file, data.nbytes)
        on_tensor(done, len(planned))


def _encode(tensor: ExportTensor, encoding: GGMLQuantizationType) -> np.ndarray:
    """Returns the encoded bytes of one tensor.

    Raises:
        ValueError: a number is too large for f16, which the scales of packed blocks are as well.
    """
    numbers = np.ascontiguousarray(tensor.read().numpy())
    largest = float(np.abs(numbers).max(initial=0))
    if encoding not in _WIDE and largest > _LARGEST_F16:
        raise ValueError(f"tensor {tensor.name}: {largest:.3g} is beyond f16's largest number; use --type bf16 or f32")
    return quantise_rows(numbers, encoding) if encoding in SUBSTITUTES else quantize(numbers, encoding)
