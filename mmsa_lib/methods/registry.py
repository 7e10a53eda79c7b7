"""The methods of the book, each behind the same contract.

A method is one readable file with a configuration whose defaults are the paper's and
whose `mode` is "paper" or, where code was released, "official". What it does to a model
is one of four things, and its entry says which:

    attach(base, config)          a frozen copy of a backbone with something that trains
    build(dims, tasks, config)    a model of its own
    rule(config, task)            a `training.Rule` around the steps of any model
    adapt(frozen, split, config)  a trained model, changed on unlabelled data

Saving, loading and counting are the same for all: `nets.trained`. The suite
``tests/test_methods.py`` runs over the registry; the page "Add a method" shows how to
enter one more.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from mmsa_lib.errors import ConfigError, unknown
from mmsa_lib.methods import cggm, generative, readout, wander

KINDS = ("attach", "build", "rule", "adapt")


@dataclass(frozen=True)
class Method:
    """An entry of the registry; exactly one of `attach`, `build`, `rule`, `adapt`.

    name     as in ``mmsa-book train NAME``, and of the chapter
    title    as pages write it
    config   its configuration; ``config()`` is the paper's
    base     what `attach` takes: "fusion" (of `nets.fusion`) or "thinker" (`nets.omni`)
    loss     training labels -> the loss that it learns with; None: the task's own
    """

    name: str
    title: str
    config: type
    attach: Callable | None = None
    build: Callable | None = None
    rule: Callable | None = None
    adapt: Callable | None = None
    base: str = "fusion"
    loss: Callable | None = None

    def __post_init__(self):
        if sum(getattr(self, kind) is not None for kind in KINDS) != 1:
            raise ConfigError(
                f"method {self.name!r} must do exactly one of {', '.join(KINDS)}"
            )

    @property
    def kind(self) -> str:
        """Which of `attach`, `build`, `rule` and `adapt` it does."""
        return next(kind for kind in KINDS if getattr(self, kind) is not None)


METHODS = {
    m.name: m
    for m in (
        Method("wander", "Wander", wander.WanderConfig, attach=wander.attach),
        Method("cggm", "CGGM", cggm.CGGMConfig, rule=cggm.GradientModulator),
        Method(
            "readout",
            "Discriminative readout",
            readout.ReadoutConfig,
            attach=readout.discriminative,
            base="thinker",
            loss=readout.standardised_loss,
        ),
        Method(
            "generative",
            "Generative twin",
            readout.ReadoutConfig,
            attach=generative.generative,
            base="thinker",
            loss=lambda labels: generative.token_loss,
        ),
    )
}


def method(name: str) -> Method:
    """The entry of that name; `UnknownNameError` lists those there are."""
    if name not in METHODS:
        raise unknown("method", name, METHODS)
    return METHODS[name]
