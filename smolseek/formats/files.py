"""Names of the files of a checkpoint folder that are neither weights nor their configuration."""

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "tokenizer.model",
    "spiece.model",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates/*.jinja",
)
"""Names, and patterns of names in a subfolder, of what a tokenizer consists of."""
LICENCE_FILES = ("LICENSE*", "LICENCE*", "COPYING*", "NOTICE*", "USE_POLICY*")
"""Patterns of names that say under which terms the weights may be used."""
