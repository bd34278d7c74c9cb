"""DeepSeek-V3 folders in other programs' formats."""
