"""LoRA against peft's on the same small Llama: forward and backward, CPU time on one thread, alternating runs.

python benchmarks/lora.py [rounds]
"""

import statistics
import sys
import time

import torch
from peft import LoraConfig, get_peft_model

from notebook_kit.adapters import LoRA, adapter_weights, attach
from notebook_kit.models import tiny_llama

SIZE = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "num_key_value_heads": 4}
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def models():
    """The same model with the same adapters, ours and peft's."""
    ours = tiny_llama(**SIZE)
    attach(ours, LoRA, targets=rf"({'|'.join(TARGETS)})$", rank=8, alpha=16)
    theirs = get_peft_model(tiny_llama(**SIZE), LoraConfig(r=8, lora_alpha=16, target_modules=TARGETS))
    tensors = adapter_weights(ours)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_" in name:
                key = name.removeprefix("base_model.model.").replace(".default.weight", "").replace("lora_", "")
                parameter.copy_(tensors[key])
    return ours.train(), theirs.train()


def seconds(model, batch) -> float:
    """CPU time of one forward and backward pass."""
    start = time.process_time()
    model(input_ids=batch, labels=batch).loss.backward()
    used = time.process_time() - start
    model.zero_grad(set_to_none=True)
    return used


def main(rounds: int) -> None:
    torch.set_num_threads(1)
    ours, theirs = models()
    for tokens in (32, 128, 512):
        batch = torch.randint(0, 256, (max(1, tokens // 128), min(tokens, 128)))
        for model in (ours, theirs):
            seconds(model, batch)
        pairs = [(seconds(ours, batch), seconds(theirs, batch)) for _ in range(rounds)]
        ratio = statistics.median(a / b for a, b in pairs)
        a, b = (statistics.median(column) * 1000 for column in zip(*pairs, strict=True))
        print(f"{tokens:4d} tokens: notebook_kit {a:6.1f} ms, peft {b:6.1f} ms, ratio {ratio:.2f}")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 30)
