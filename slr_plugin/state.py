"""What a call of the loss leaves behind: the queue and the step count. When they advance, and how they are loaded.

Activation checkpointing computes a call again in the backward:

==============  ==================================================  ====================================================
checkpointing   the first run                                       the second run
==============  ==================================================  ====================================================
non-reentrant   advances queue and schedule                         advances nothing; an error if there is either, since
                                                                    its keys or its confidence are others
reentrant       is idle, as no gradient is recorded                 advances; an error if another call did in between
either, with    is idle                                             is idle; an error if another call advanced
update=False
==============  ==================================================  ====================================================

What torch keeps private tells the cases; a torch that does not is taken to compute every call once.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from slr_plugin.checks import check_flag, check_integer
from slr_plugin.key_sets import KeySet
from slr_plugin.queue import KeyQueue
from slr_plugin.settings import HasSettings


class HasState(HasSettings):
    """A loss with a queue of keys and a count of the calls that advanced it."""

    memory_bank: KeyQueue
    step: Tensor

    def __init__(self, memory_bank: KeyQueue) -> None:
        super().__init__()
        self.memory_bank = memory_bank
        self._step_of_idle_call = torch.zeros(())  # of the newest call that advanced nothing
        self.register_buffer("step", torch.zeros((), dtype=torch.long))

    @torch.no_grad()
    def set_step(self, step: int) -> None:
        """Place the schedule of the confidence at ``step``, for trainers that count steps themselves.

        A call counts one step, which is wrong where several batches make one optimizer step or a run begins anew with
        loaded weights. Call this before every batch with the trainer's own count (Lightning's ``global_step``) and give
        the schedule the trainer's total.

        Raises:
            ValueError: ``step`` is negative.
            TypeError: ``step`` is not an integer.
        """
        check_integer("step", step, low=0)
        self.step.fill_(step)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Start again: a fresh random queue, and step 0.

        To be called after ``to_empty``; from the meta device it is called by itself. A temperature that is a parameter
        has lost its value there: assign it again.
        """
        self.memory_bank.reset_parameters()
        self.step.zero_()

    def _decide_update(self, out0: Tensor, update: bool | None) -> bool:
        """Return whether the queue and the schedule advance after a call; raise if they have for it already."""
        updates = check_flag("update", out0.requires_grad and torch.is_grad_enabled() if update is None else update)
        if torch.compiler.is_compiling():
            return updates
        if not _is_repeated():
            if not updates:
                self._step_of_idle_call = self.step.clone()
            return updates
        # A repetition is right where the first run advanced nothing, and no other call has since.
        first_was_idle = not updates or (_is_in_reentrant_checkpoint() and update is None)
        if self._moves_on() and not (first_was_idle and self._step_of_idle_call == self.step):
            raise RuntimeError(
                "activation checkpointing computes SLRLoss again after its queue or schedule moved on, so its gradient "
                "would be wrong: checkpoint the encoder without the loss, which needs O(s d) memory anyway"
            )
        return updates and first_was_idle

    def _moves_on(self) -> bool:
        """Whether a later call can differ: there is a queue or a schedule."""
        return len(self.memory_bank) > 0 or callable(self.confidence)

    @torch.no_grad()
    def _advance(self, key_set: KeySet) -> None:
        """Enqueue the keys and count the step; a batch with a non-finite key or estimator does neither."""
        estimators = None if key_set.estimator is None else key_set.estimator.keys_to_enqueue
        accepted = self.memory_bank.enqueue(key_set.keys_to_enqueue, estimators, key_set.groups_to_enqueue)
        self.step.add_(accepted.to(self.step.device))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> HasState:
        """Move or convert; what leaves the meta device, where it had no values, starts afresh."""
        had_values = not self.step.is_meta
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if not had_values and not self.step.is_meta:
            self.reset_parameters()
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Tolerate a checkpoint without step count, NTXentLoss's: its absence matters to schedules only.

        One whose queue does not fit changes nothing: the queue, which comes next, raises.
        """
        if self.memory_bank.refusal(state_dict, f"{prefix}memory_bank."):
            return
        if prefix + "step" not in state_dict:
            if callable(self.confidence):
                warnings.warn(
                    f"the checkpoint holds no step count ({prefix + 'step'!r}): the confidence schedule stays "
                    "where it is",
                    stacklevel=2,
                )
            state_dict = state_dict | {prefix + "step": self.step}
        super()._load_from_state_dict(state_dict, prefix, *args)


def _is_repeated() -> bool:
    """Whether the current call is made in a backward and records a gradient, as checkpointing does."""
    number = getattr(torch._C, "_current_graph_task_id", None)
    return torch.is_grad_enabled() and number is not None and number() != -1


def _is_in_reentrant_checkpoint() -> bool:
    """Whether the backward under way is that of reentrant activation checkpointing."""
    node = getattr(torch._C, "_current_autograd_node", None)
    return node is not None and "CheckpointFunction" in type(node()).__name__
