"""Runs in the environment of vLLM: the log-probability of each token of some prompts. Knows nothing of Abyssal.

    python read_vllm.py REQUEST ANSWER

Request: model, prompts (ids). Answer: version, and for each prompt one list: of each token after the first, its
log-probability.
"""

import json
import os
import sys
from pathlib import Path

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # the engine in this process
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import vllm


def main(request_file: str, answer_file: str) -> None:
    request = json.loads(Path(request_file).read_text(encoding="utf-8"))
    model = vllm.LLM(
        model=request["model"],
        dtype="float32",
        enforce_eager=True,
        max_model_len=max(map(len, request["prompts"])) + 1,
        max_num_seqs=4,
        enable_prefix_caching=False,
    )
    parameters = vllm.SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0)
    prompts = [{"prompt_token_ids": prompt} for prompt in request["prompts"]]
    outputs = model.generate(prompts, parameters, use_tqdm=False)
    answer = {
        "version": vllm.__version__,
        "log_probabilities": [
            [place[token].logprob for token, place in zip(prompt[1:], output.prompt_logprobs[1:], strict=True)]
            for prompt, output in zip(request["prompts"], outputs, strict=True)
        ],
    }
    Path(answer_file).write_text(json.dumps(answer), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
