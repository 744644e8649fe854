"""What a run tells of itself where there is no terminal: a line now and then, in place of a bar."""

import sys
from typing import Any

import lightning as L


class LossLines(L.Callback):
    """Prints updates, loss and rate, of each epoch's first and last update and at Lightning's interval of logging."""

    def __init__(self) -> None:
        self._told = 0
        self._epoch = -1

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        step = trainer.global_step
        if not trainer.is_global_zero or step == self._told:  # accumulated passes make no update
            return
        first = trainer.current_epoch != self._epoch
        if first or step % trainer.log_every_n_steps == 0 or trainer.is_last_batch:
            self._told, self._epoch = step, trainer.current_epoch
            loss = trainer.callback_metrics.get("train/loss")
            rate = trainer.optimizers[0].param_groups[0]["lr"]
            shown = "" if loss is None else f"  loss {loss:.4f}"
            print(f"epoch {trainer.current_epoch}  update {step}{shown}  lr {rate:.3e}", file=sys.stderr, flush=True)

    def on_validation_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.is_global_zero:
            scores = {key: f"{value:.4f}" for key, value in trainer.callback_metrics.items() if key.startswith("val/")}
            shown = "  ".join(f"{key} {value}" for key, value in scores.items())
            print(f"epoch {trainer.current_epoch}  validated  {shown}", file=sys.stderr, flush=True)
