"""A recorder that stores every mask and counts with plain loops over tokens: the truth for MaskRecorder."""

from collections import defaultdict
from functools import cache

import torch

from dllm_sparse.analysis.tallies import PER_TOKEN_ONE, TAUS, WINDOW_SIZES
from dllm_sparse.types import Observer, TokenClass


class StoringRecorder(Observer):
    def __init__(self, kind, sampler):
        self.causal, self.sampler = kind == "autoregressive", sampler
        self.masks, self.values, self.classes = {}, {}, {}  # (site, step) -> {(row, position): ...}
        self.steps, self.canvas_length = {}, 0

    def on_start(self, ids, token_class):
        self.canvas_length = ids.shape[1]

    def on_mask(self, site, values, keep, context):
        if site.expert >= 0:
            return
        rows = keep.shape[0] // 2 if context.guided else keep.shape[0]
        self.steps[context.step.index] = context.step
        cells = [(row, token) for row in range(rows) for token in range(keep.shape[1])]
        key = (site, context.step.index)
        kinds = context.token_class
        for table, given in ((self.masks, keep.clone()), (self.values, values.clone()), (self.classes, kinds.tolist())):
            fed = {(row, context.start + t): given[row][t] for row, t in cells}
            table.setdefault(key, {}).update(fed)  # a step may have several forwards

    def before(self, site, step, row, position):
        if self.causal:
            last = max((at for at_row, at in self.masks.get((site, step - 1), {}) if at_row == row), default=None)
            return (row, last) if last is not None else None
        return (row, position) if (row, position) in self.masks.get((site, step - 1), {}) else None

    @cache  # noqa: B019 (a test's own object)
    def reference(self, site, row, position):
        if not self.causal:
            return next(
                masks[row, position] for (at, _), masks in self.masks.items() if at == site and (row, position) in masks
            )
        first = self.masks[site, 0]
        prompt = [
            mask
            for (at_row, at), mask in first.items()
            if at_row == row and self.classes[site, 0][at_row, at] == TokenClass.PROMPT
        ]
        frequency = torch.stack(prompt).sum(0)
        size = round(float(frequency.sum() / len(prompt)))
        order = sorted(range(len(frequency)), key=lambda n: (-int(frequency[n]), n))[:size]
        return torch.tensor([n in order and frequency[n] > 0 for n in range(len(frequency))])

    def steps_table(self):
        """(site, row, step, class) -> the counts of tallies.Column, in its order."""
        table = defaultdict(lambda: [0] * (14 + len(TAUS)))
        for (site, step), masks in self.masks.items():
            for (row, position), keep in masks.items():
                kind = self.classes[site, step][row, position]
                if kind == TokenClass.PADDING:
                    continue
                line = table[site, row, step, kind]
                line[0] += 1
                line[1] += int(keep.sum())
                add(line, 8, compared(keep, self.reference(site, row, position)))
                earlier = self.before(site, step, row, position)
                if earlier is None:
                    continue
                add(line, 2, compared(keep, self.masks[site, step - 1][earlier]))
                old, new = self.values[site, step - 1][earlier], self.values[site, step][row, position]
                change = float((new - old).norm() / old.norm())
                add(line, 14, [int(change > tau) for tau in TAUS])
        return table

    def unions_table(self):
        """(site, row, step) -> [(kept, windows) per window size, then of the whole block]."""
        table = {}
        for (site, step), masks in self.masks.items():
            if self.causal and step > 0:
                continue
            for row in sorted({row for row, _ in masks}):
                block = self.canvas_length - self.sampler.gen_length
                block += self.steps[step].block * self.sampler.block_length
                places = range(block, block + self.sampler.block_length)
                if self.causal:
                    places = [position for at, position in masks if at == row]
                real = [self.classes[site, step][row, at] != TokenClass.PADDING for at in places]
                kept = [masks[row, at] for at in places]
                table[site, row, step] = [union(kept, real, size) for size in WINDOW_SIZES if size <= len(places)]
                whole = [mask for mask, counted in zip(kept, real, strict=True) if counted]
                table[site, row, step].append((int(torch.stack(whole).any(0).sum()), 1))
        return table

    def lag_table(self, every, deltas):
        """(site, row, step, delta, class) -> counts of a comparison with the snapshot `delta` steps earlier."""
        table = defaultdict(lambda: [0] * 6)
        for (site, step), masks in self.masks.items():
            for delta in deltas:
                earlier = self.masks.get((site, step - delta), {})
                for (row, position), keep in masks.items():
                    kind = self.classes[site, step][row, position]
                    old = earlier.get((row, position))
                    if self.causal and earlier:
                        old = earlier[row, max(at for at_row, at in earlier if at_row == row)]
                    if kind != TokenClass.PADDING and old is not None and (step - delta) % every == 0:
                        add(table[site, row, step, delta, kind], 0, compared(keep, old))
        return table


def compared(keep, other):
    intersection, union = int((keep & other).sum()), int((keep | other).sum())
    return [
        1,
        int(keep.sum()),
        int(other.sum()),
        intersection,
        union,
        round(intersection / max(union, 1) * PER_TOKEN_ONE),
    ]


def union(kept, real, size):
    spans = [range(end - size, end) for end in range(len(kept), size - 1, -size)]
    spans = [span for span in spans if all(real[at] for at in span)]
    return sum(int(torch.stack([kept[at] for at in span]).any(0).sum()) for span in spans), len(spans)


def add(line, start, values):
    for place, value in enumerate(values):
        line[start + place] += value
