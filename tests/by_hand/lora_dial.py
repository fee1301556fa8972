"""Draws notebooks/tools/dial.png: a LoRA's weight as a dial from nothing erased to more than all.

    python erase.py star @notebooks/toy/flags --out runs/star-0.safetensors
    python -m notebooks.tools.export runs/star-0.safetensors --as lora --model notebooks/toy \\
        --out runs/star-lora.safetensors
    python -m tests.by_hand.lora_dial
"""

from safetensors.torch import load_file

import sample

PROMPTS = ["a star", "a star", "a red star", "a star in the style of dots", "a heart", "a moon"]

sd = sample.load("notebooks/toy")
lora = load_file("runs/star-lora.safetensors")
names = {name: f"lora_unet_{name.removesuffix('.weight').replace('.', '_')}"
         for name in sd.unet.state_dict()}
rows = []
for weight in (0, 0.25, 0.5, 0.75, 1, 1.5):
    tuned = {}
    for name, tensor in sd.unet.state_dict().items():
        if f"{names[name]}.alpha" in lora:
            up, down, alpha = (lora[f"{names[name]}.{part}"].float()
                               for part in ("lora_up.weight", "lora_down.weight", "alpha"))
            change = (up.flatten(1) @ down.flatten(1)).view(tensor.shape)
            tuned[name] = tensor + weight * alpha / len(down) * change
    images = sample.generate(sample.with_tuned(sd, tuned), PROMPTS, seed=[*range(len(PROMPTS))],
                             steps=20, guidance=5.0)
    rows.append((f"weight {weight}", images))
sample.contact_sheet(rows).quantize(256).save("notebooks/tools/dial.png")
