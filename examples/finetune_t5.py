"""Fine-tune any T5 on lines "source<tab>target": `python finetune_t5.py google-t5/t5-small pairs.tsv out`."""

import sys
from pathlib import Path

import torch
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

import bwsk

if len(sys.argv) != 4:
    sys.exit(__doc__)
name, data, out = sys.argv[1:]
device = "cuda" if torch.cuda.is_available() else "cpu"
model = AutoModelForSeq2SeqLM.from_pretrained(name, attn_implementation="eager").to(device).train()
tokenizer = AutoTokenizer.from_pretrained(name)
plan = bwsk.make_reversible(model, budget="fast").plan
print(f"predicted peak of a step of 4 × (256 + 256) tokens: {plan.peak / 2**20:,.0f} MiB")
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
pairs = [line.split("\t") for line in Path(data).read_text(encoding="utf-8").splitlines()]
for start in range(0, len(pairs), 4):
    sources, targets = zip(*pairs[start : start + 4], strict=True)
    batch = tokenizer(sources, text_target=targets, padding=True, truncation=True, return_tensors="pt").to(device)
    batch["labels"][batch["labels"] == tokenizer.pad_token_id] = -100
    model(**batch).loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
model.save_pretrained(out)
tokenizer.save_pretrained(out)
