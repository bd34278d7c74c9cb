"""Greedy tokens by vLLM; run by the Python that has it: in_vllm.py JOBS OUT.

JOBS is a JSON file with a list of jobs, which run one after another: each has `folder`, `prompts` (token ids),
`new_tokens` and perhaps `dtype`. OUT gets a line of JSON for each. A job that vLLM runs has `answers`: for each prompt
its tokens and their log-probabilities; and `bias`, the type of the balancing biases in memory, or null. A job that vLLM
refuses has `error`. The environment variable VLLM_MLA_DISABLE=1 makes vLLM cache whole keys and values.
"""

import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1"}

from vllm import LLM, SamplingParams
from vllm.distributed.parallel_state import cleanup_dist_env_and_memory


def bias_type(model: Any) -> str | None:
    """Returns the type of the first balancing bias."""
    types = [str(value.dtype) for name, value in model.named_parameters() if name.endswith("e_score_correction_bias")]
    return types[0] if types else None


def run(job: dict[str, Any]) -> dict[str, Any]:
    """Returns what vLLM makes of one job."""
    llm = LLM(
        job["folder"],
        dtype=job.get("dtype", "float32"),
        enforce_eager=True,
        max_model_len=64,
        max_num_batched_tokens=64,  # as many as it tries the model with before it begins
        max_num_seqs=4,
        gpu_memory_utilization=0.1,  # of the machine's memory, which others use too
        skip_tokenizer_init=True,
        compilation_config={"custom_ops": ["none"]},  # its CPU kernel for RoPE is wrong for interleaved pairs
        **({} if os.environ.get("VLLM_MLA_DISABLE") == "1" else {"attention_backend": "CPU_MLA"}),
    )
    sampling = SamplingParams(
        temperature=0, max_tokens=job["new_tokens"], logprobs=1, detokenize=False, ignore_eos=True
    )
    done = llm.generate([{"prompt_token_ids": prompt} for prompt in job["prompts"]], sampling)
    answers = []
    for (answer,) in (request.outputs for request in done):
        chosen = zip(answer.token_ids, answer.logprobs, strict=True)
        answers.append([list(answer.token_ids), [logprobs[token].logprob for token, logprobs in chosen]])
    return {"answers": answers, "bias": llm.apply_model(bias_type)[0]}


def main(jobs_file: str, out: str) -> None:
    """Run every job; a line is written before the next job begins, because some folders end the whole process."""
    Path(out).write_text("", encoding="utf-8")
    for job in json.loads(Path(jobs_file).read_text(encoding="utf-8")):
        try:
            said = run(job)
        except (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError):
            said = {"error": traceback.format_exc()}
        with Path(out).open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(said) + "\n")
        cleanup_dist_env_and_memory()


main(*sys.argv[1:])
