"""A recipe of a few seconds: two layers of 32 features, over short documents and a few hundred problems."""

from __future__ import annotations

DOCUMENTS = '[[mix]]\nsource = "documents"\nlength = 48\nrows = 8\n'
STREAM = '[[mix]]\nsource = "stream"\nlength = 64\nrows = 4\n'
SKILLS = '[[mix]]\nsource = "skills"\nlength = 32\nrows = 8\n'


def toy_recipe(*mix: str, steps: int, checkpoint_every: int, evaluate_every: int) -> str:
    """The recipe as TOML, with the given micro-batches."""
    return f"""
name = "toy"
seed = 7
steps = {steps}
checkpoint_every = {checkpoint_every}
evaluate_every = {evaluate_every}
[model]
width = 32
layers = 2
heads = 2
ffn_width = 96
max_positions = 64
[data]
vocab_size = 420
held_out_per_mille = 100
min_characters = 60
skill_problems = 300
[optimiser]
peak_rate = 5e-3
warmup_steps = 5
{"".join(mix)}"""
