"""Greedy tokens by vLLM; run by the Python that has it: in_vllm.py JOB OUT.

JOB is a JSON file with `folder`, `prompts` (token ids) and `new_tokens`; OUT gets for each prompt its tokens and their
log-probabilities. The environment variable VLLM_MLA_DISABLE=1 makes vLLM cache whole keys and values.
"""

import json
import os
import sys
from pathlib import Path

os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1"}

from vllm import LLM, SamplingParams


def main(job_file: str, out: str) -> None:
    """Generate and write."""
    job = json.loads(Path(job_file).read_text(encoding="utf-8"))
    model = LLM(
        job["folder"],
        dtype="float32",
        enforce_eager=True,
        max_model_len=64,
        gpu_memory_utilization=0.1,  # of the machine's memory, which others use too
        skip_tokenizer_init=True,
        compilation_config={"custom_ops": ["none"]},  # its CPU kernel for RoPE is wrong for interleaved pairs
        **({} if os.environ.get("VLLM_MLA_DISABLE") == "1" else {"attention_backend": "CPU_MLA"}),
    )
    sampling = SamplingParams(
        temperature=0, max_tokens=job["new_tokens"], logprobs=1, detokenize=False, ignore_eos=True
    )
    done = model.generate([{"prompt_token_ids": prompt} for prompt in job["prompts"]], sampling)
    answers = []
    for (answer,) in (request.outputs for request in done):
        chosen = zip(answer.token_ids, answer.logprobs, strict=True)
        answers.append([list(answer.token_ids), [logprobs[token].logprob for token, logprobs in chosen]])
    Path(out).write_text(json.dumps(answers), encoding="utf-8")


main(*sys.argv[1:])
