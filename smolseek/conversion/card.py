"""The model card of a converted folder."""

from __future__ import annotations

import math
from typing import Any

import yaml

_CARD = """---
library_name: transformers
pipeline_tag: text-generation
tags: [deepseek_v3, mla, smolseek]
{base_model}---
# {name}

{source}, converted to a stock `DeepseekV3ForCausalLM` by smolseek {version}{form}.

| per token | numbers | bytes ({dtype}) |
|---|---|---|
| key-value cache of the source | {source_numbers:,} | {source_bytes:,} |
| key-value cache of this model | {numbers:,} | {bytes:,} |
{losses}
Converted in {seconds:,.0f} s with seed {seed}, transformers {transformers} and torch {torch}. The error of every layer
by stage is in `conversion.json`. It learned from the dense model's outputs alone; `smolseek train` heals it on text.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{name}")
tokenizer = AutoTokenizer.from_pretrained("{name}")
```

Settings of the conversion:

```yaml
{settings}```
"""


def model_card(name: str, report: dict[str, Any], dtype: str) -> str:
    """README.md with what was converted, how, and what it costs and keeps, from the contents of conversion.json."""
    cache, source = report["cache"], report["source"]
    losses = ""
    if report["losses"]:
        stages = ", ".join(
            f"{math.exp(loss):.3f} {stage.replace('_', ' ')}" for stage, loss in report["losses"].items()
        )
        tokens = report["calibration"]["judged_tokens"]
        digest = report["calibration"]["tokens_sha256"]
        losses = (
            f"\nPerplexity on {tokens:,} tokens of the text that the conversion did not learn from: {stages}. "
            f"Calibration tokens: sha256 {digest}.\n"
        )
    return _CARD.format(
        base_model=f"base_model: {source}\n" if source.count("/") == 1 and not source.startswith((".", "/")) else "",
        name=name,
        source=source,
        version=report["versions"]["smolseek"],
        form=" (the exact form: loads in transformers only)" if report["settings"]["exact"] else "",
        dtype=dtype,
        source_numbers=cache["source_numbers_per_token"],
        source_bytes=cache["source_bytes_per_token"],
        numbers=cache["numbers_per_token"],
        bytes=cache["bytes_per_token"],
        losses=losses,
        seconds=report["seconds"],
        seed=report["settings"]["seed"],
        transformers=report["versions"]["transformers"],
        torch=report["versions"]["torch"],
        settings=yaml.safe_dump({**report["settings"], "source": source}, sort_keys=True, allow_unicode=True),
    )
