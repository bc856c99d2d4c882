"""A pretext in stages, one after the other."""

from dataclasses import dataclass
from itertools import accumulate

from medcook.methods import Moment
from medcook.pretraining import Pretrained, one_cycle


@dataclass
class Staged(Pretrained):
    """Each stage of the pretext has a one-cycle schedule of its own; a subclass says how long each takes."""

    def stages(self) -> tuple[float, ...]:
        """The share of the pretext's steps that each stage gets; 1 in all."""
        raise NotImplementedError

    def stage(self, now: Moment) -> tuple[int, Moment]:
        """Which stage a step of the pretext is of, 0, 1, ..., and where in this stage it stands."""
        first = 0
        for number, share in enumerate(accumulate(self.stages())):
            last = round(share * now.steps)
            if now.step < last:
                return number, Moment(now.step - first, last - first)
            first = last
        raise ValueError(f"Step {now.step} of {now.steps} is beyond the stages' {first}.")

    def rate_at(self, now: Moment) -> float:
        is_pretext, then = self.phase(now)
        return self.pretext_rate * one_cycle(*self.stage(then)[1]) if is_pretext else super().rate_at(now)
