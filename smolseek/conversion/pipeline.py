"""The conversion, folder to folder: check, calibrate, convert layer by layer, write a stock DeepSeek-V3 checkpoint."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import math
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import DeepseekV3Config

from smolseek.checkpoint.atomic import refuse_existing
from smolseek.checkpoint.folder import FolderWriter, TensorFolder
from smolseek.checkpoint.hub import load_stock, load_tokenizer
from smolseek.checkpoint.source import read_config, resolve_folder
from smolseek.config import ConvertSettings
from smolseek.conversion.attention import (
    Compression,
    Projections,
    RopePlan,
    Shape,
    compress,
    exact_tensors,
    portable_tensors,
    rope_plans,
)
from smolseek.conversion.card import model_card
from smolseek.conversion.experts import balancing_bias, router_rows, upcycle
from smolseek.conversion.moments import collect_mlp_inputs, collect_moments, collect_norm_moments
from smolseek.conversion.sources import check_tensors
from smolseek.conversion.target import read_source, target_config
from smolseek.data import calibration_windows
from smolseek.model import DeepseekV3
