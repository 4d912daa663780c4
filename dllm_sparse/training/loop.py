"""The training loop: the same on a CPU, one GPU or several, and resumable to the bit on a CPU.

A step draws its rows, noise and learning rate from (seed, step) alone. The state of a run is therefore its weights and
AdamW moments; nothing else has to be saved.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dllm_sparse.files import write_json
from dllm_sparse.models.export import export_model
from dllm_sparse.models.transformer import Transformer
from dllm_sparse.training.checkpoints import latest_checkpoint, load_checkpoint, save_checkpoint
from dllm_sparse.training.data import Prepared
from dllm_sparse.training.examples import draw_example, held_out_examples
from dllm_sparse.training.graphs import GraphedMicroBatch, allocate_gradients
from dllm_sparse.training.log import append_log, draw_losses, rewind_log
from dllm_sparse.training.model import LossModel, initialise
from dllm_sparse.training.objectives import Example
from dllm_sparse.training.optimiser import learning_rate, optimiser_of
from dllm_sparse.training.recipe import Recipe
from dllm_sparse.training.snapshots import save_snapshot
from dllm_sparse.training.tokenizer import SPECIAL_TOKENS
from dllm_sparse.types import DllmSparseError, Kind, UsageError

LOG_EVERY = 20


@dataclass(frozen=True, slots=True)
class Progress:
    """What a display needs after a logged step; speed in token positions a second over all processes."""

    step: int
    steps: int
    loss: float
    tokens_per_second: float
    seconds_left: float
    held_out_loss: float | None


class Trainer:
    """One run in one folder: checkpoints/, log.jsonl, recipe.json, and at the end loss.png and model/."""

    def __init__(
        self,
        recipe: Recipe,
        kind: Kind,
        prepared: Prepared,
        folder: Path,
        *,
        cpu: bool = False,
        compiled: bool = False,
        snapshots: Sequence[int] = (),
    ) -> None:
        from accelerate import Accelerator

        self.recipe, self.kind, self.prepared, self.folder = recipe, kind, prepared, folder
        self.snapshots = frozenset(snapshots)
        self.unlogged: list[Tensor] = []  # losses of the steps since the last log entry
        gpu = torch.cuda.is_available() and not cpu
        self.accelerator = Accelerator(cpu=not gpu, mixed_precision="bf16" if gpu else "no")
        rows = min(mix.rows for mix in recipe.mix)
        if rows < self.accelerator.num_processes:
            raise UsageError(f"{self.accelerator.num_processes} processes, but a mix entry has only {rows} rows a step")
        self.transformer = Transformer(recipe.transformer_config(kind, prepared.special))
        initialise(self.transformer, recipe.seed)
        self.transformer.to(self.accelerator.device)
        optimiser = optimiser_of(self.transformer, recipe.optimiser, fused=gpu)
        self.step, self.seconds = self._resume(optimiser)
        self.model, self.optimiser = self.accelerator.prepare(LossModel(self.transformer, compiled), optimiser)
        self.graphs: list[GraphedMicroBatch] = []
        if compiled and gpu and self.accelerator.num_processes == 1:
            self.capture()

    @property
    def main_process(self) -> bool:
        """Whether this process is the one that writes."""
        return bool(self.accelerator.is_main_process)

    def _resume(self, optimiser: torch.optim.Optimizer) -> tuple[int, float]:
        """Continues from the newest checkpoint of this very recipe and objective, if there is one."""
        facts: dict[str, Any] = {"recipe": self.recipe.digest(), "kind": self.kind}
        found = latest_checkpoint(self.folder / "checkpoints")
        state = {"step": 0, "seconds": 0.0, "unlogged": [], **facts}
        if found:
            state = load_checkpoint(found, self.transformer, optimiser)
        for key, value in facts.items():
            if state.get(key) != value:
                raise UsageError(f"{found} is from another {key}; give another output folder, or remove this one")
        if self.accelerator.is_main_process:
            self.folder.mkdir(parents=True, exist_ok=True)
            rewind_log(self.folder / "log.jsonl", int(state["step"]))
            write_json(self.folder / "recipe.json", {"kind": self.kind, **self.recipe.to_dict()})
        device = self.accelerator.device
        self.unlogged = [torch.tensor(losses, device=device) for losses in state.get("unlogged", [])]
        return int(state["step"]), float(state["seconds"])

    def run(self, report: Callable[[Progress], None] = lambda _: None) -> None:
        """Trains to the recipe's last step; an interruption leaves the last checkpoint to continue from."""
        recipe, started = self.recipe, time.monotonic()
        mark, marked = started, self.step
        with ThreadPoolExecutor(1) as pool:
            ahead = pool.submit(self._draw, self.step)
            while self.step < recipe.steps:
                examples = ahead.result()
                if self.step + 1 < recipe.steps:
                    ahead = pool.submit(self._draw, self.step + 1)
                self.unlogged.append(self._train_step(examples))
                self.step += 1
                last = self.step == recipe.steps
                if last or self.step % LOG_EVERY == 0 or self.step % recipe.evaluate_every == 0:
                    mean = torch.stack(self.unlogged).mean(0).tolist()
                    now = time.monotonic()
                    speed = (self.step - marked) * recipe.tokens_per_step / max(now - mark, 1e-9)
                    self._log(mean, speed, self.seconds + now - started, last, report)
                    mark, marked, self.unlogged = time.monotonic(), self.step, []
                if self.step in self.snapshots:
                    self._snapshot()
                if last or self.step % recipe.checkpoint_every == 0:
                    self._save(self.seconds + time.monotonic() - started)

    def _draw(self, step: int) -> list[Example]:
        recipe = self.recipe
        drawn = (draw_example(recipe, self.kind, self.prepared, n, mix, step) for n, mix in enumerate(recipe.mix))
        share = slice(self.accelerator.process_index, None, self.accelerator.num_processes)
        return [Example(e.inputs[share], e.targets[share], e.weights[share], e.normaliser) for e in drawn]

    def _train_step(self, examples: list[Example]) -> Tensor:
        """One optimiser step; returns this process's part of each micro-batch's loss, in nats a token."""
        rate = learning_rate(self.step, self.recipe.steps, self.recipe.optimiser)
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        losses = [self._micro_batch(number, example) for number, example in enumerate(examples)]
        self.accelerator.clip_grad_norm_(self.model.parameters(), self.recipe.optimiser.clip)
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=not self.graphs)
        return torch.stack(losses)

    def _micro_batch(self, number: int, example: Example) -> Tensor:
        """Adds one micro-batch's gradient and returns this process's part of its loss, in nats a token."""
        mix = self.recipe.mix
        share = mix[number].weight / sum(entry.weight for entry in mix)
        # Each process divides by the whole micro-batch, and gradients are averaged: hence the factor of processes.
        factor = self.accelerator.num_processes / max(example.normaliser, 1.0)
        if self.graphs:
            return self.graphs[number](example, factor)
        synchronise = number + 1 == len(mix)
        with nullcontext() if synchronise else self.accelerator.no_sync(self.model):
            loss: Tensor = self._forward(example) * factor
            self.accelerator.backward(loss * share)
        return loss.detach()

    def capture(self) -> None:
        """Replaces launches by CUDA graphs, one for each micro-batch; for a compiled model in one process on a GPU."""
        mix = self.recipe.mix
        allocate_gradients(list(self.model.parameters()))
        total = sum(entry.weight for entry in mix)
        self.graphs = [
            GraphedMicroBatch(self.model, example, entry.weight / total, self.accelerator.device)
            for entry, example in zip(mix, self._draw(0), strict=True)
        ]
        self.optimiser.zero_grad(set_to_none=False)

    def _forward(self, example: Example) -> Tensor:
        device = self.accelerator.device
        parts = (torch.from_numpy(part).to(device, non_blocking=True) for part in example[:3])
        loss: Tensor = self.model(*parts)
        return loss

    @torch.no_grad()
    def held_out_loss(self) -> float:
        """Nats a token on held-out documents, the same rows and masks every time; a bound for diffusion."""
        total, weight = 0.0, 0.0
        with torch.compiler.set_stance("force_eager"):
            for example in held_out_examples(self.recipe, self.kind, self.prepared):
                total += float(self._forward(example))
                weight += example.normaliser
        return total / weight

    def _log(
        self, losses: list[float], speed: float, seconds: float, last: bool, report: Callable[[Progress], None]
    ) -> None:
        losses = self.accelerator.gather(torch.tensor([losses], device=self.accelerator.device)).mean(0).tolist()
        recipe, step = self.recipe, self.step
        mean = sum(mix.weight * loss for mix, loss in zip(recipe.mix, losses, strict=True))
        mean /= sum(mix.weight for mix in recipe.mix)
        if not math.isfinite(mean):
            raise DllmSparseError(f"the loss is {mean} at step {step}: lower optimiser.peak_rate and resume")
        held = self.held_out_loss() if last or step % recipe.evaluate_every == 0 else None
        if not self.accelerator.is_main_process:
            return
        entry = {"step": step, "tokens": step * recipe.tokens_per_step, "loss": mean, "losses": losses}
        entry |= {"rate": learning_rate(step - 1, recipe.steps, recipe.optimiser), "tokens_per_second": speed}
        entry |= {"seconds": seconds} | ({} if held is None else {"held_out_loss": held})
        append_log(self.folder / "log.jsonl", entry)
        left = (recipe.steps - step) * recipe.tokens_per_step / max(speed, 1e-9)
        report(Progress(step, recipe.steps, mean, speed, left, held))

    def _snapshot(self) -> None:
        """Keeps the model as it is now, beside the checkpoints, which are replaced."""
        if self.accelerator.is_main_process:
            tokens = self.step * self.recipe.tokens_per_step
            facts = {"step": self.step, "tokens": tokens, "kind": self.kind, "recipe": self.recipe.digest()}
            model = self.recipe.to_dict()["model"]
            save_snapshot(
                self.folder / "snapshots", self.transformer, self.kind, self.prepared.tokenizer, {**facts, **model}
            )

    def _save(self, seconds: float) -> None:
        # The next log entry averages over these steps, too: a resumed run must log what an uninterrupted one would.
        unlogged = self.accelerator.gather(torch.stack(self.unlogged)[None]).mean(0).tolist() if self.unlogged else []
        if self.accelerator.is_main_process:
            facts = {"recipe": self.recipe.digest(), "kind": self.kind, "seconds": seconds, "unlogged": unlogged}
            save_checkpoint(self.folder / "checkpoints", self.step, self.transformer, self.optimiser.optimizer, facts)
        self.accelerator.wait_for_everyone()

    def finish(self) -> list[Path]:
        """Writes the trained model in its family's format (bf16) and the loss curve; returns the paths."""
        if not self.accelerator.is_main_process:
            return []
        family = "llama" if self.kind == "autoregressive" else "llada"
        model = export_model(
            self.transformer, self.folder / "model", family, self.prepared.tokenizer, SPECIAL_TOKENS, torch.bfloat16
        )
        log = rewind_log(self.folder / "log.jsonl", self.step)
        return [model, draw_losses({self.kind: log}, self.folder / "loss.png"), self.folder / "log.jsonl"]
