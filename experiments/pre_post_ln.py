"""Where does the norm belong: who trains, who stalls, who diverges, and does theory foresee it?"""

from typing import Any

import numpy as np

from experiments import pre_post_ln_judges as judges
from experiments.atlas import drawing, frame
from experiments.pre_post_ln_nets import NORMS, Config, kept, points
from jaxgrad import theory


def _figure_gradients(config: Config, data: frame.Data) -> Any:
    figure, axes = drawing.panels(3, width=11.4, height=3.6)
    depths, arrays = kept(config.depth), data["feed_forward"]
    for k, norm in enumerate(NORMS):
        label = f"{norm.capitalize()}-LN"
        drawing.line(axes[0], k, depths, arrays[f"{norm}_last"], label)
        law = theory.last_weight_gradient(config.width, depths, norm)
        drawing.theory(axes[0], depths, law, "theory" if k == 0 else "")
        drawing.line(axes[1], k, depths, arrays[f"{norm}_profile"], label)
        blocks = np.arange(1, config.blocks + 1)
        drawing.line(axes[2], k, blocks, data["attention"][norm], label, markevery=4)
    for ax in axes[:2]:
        ax.set_xscale("log")
        ax.set_yscale("log")
    drawing.theory(axes[2], blocks, judges.two_modes(config), "two modes, uniform attention")
    drawing.words(axes[0], "The last block's gradient", "depth L", "|dL/dW2| of block L")
    title = f"Within a net of {config.depth} blocks"
    drawing.words(axes[1], title, "block", "|dL/dW2| of the block")
    drawing.words(axes[2], "With attention", "block", "ln |dL/dh| over the last")
    return figure


def _figure_training(config: Config, data: frame.Data) -> Any:
    cases = judges.tasks(config)
    figure, axes = drawing.panels(len(cases), width=3.8 * len(cases), height=3.6)
    for ax, (name, case) in zip(axes, cases.items(), strict=True):
        for k, norm in enumerate(NORMS):
            found = np.nan_to_num(judges.losses(data, case, norm), nan=9, posinf=9)
            for j, (end, style) in enumerate((("", "-"), (", warm-up", ":"))):
                label = f"{norm.capitalize()}-LN{end}"
                drawing.line(
                    ax, 2 * k + j, judges.rates(config, case), found[..., j], label, linestyle=style
                )
        chance = judges.marginal(data, case)
        ax.axhline(
            chance, color=drawing.INK, linestyle="--", linewidth=1.0, label="entropy of the labels"
        )
        ax.set_xscale("log")
        ax.set_ylim(0, 1.9 * chance)
        title = f"{name[0].upper()}{name[1:]}"
        drawing.words(ax, title, "peak learning rate of Adam", "loss at the end, nats")
    return figure


def figures(config: Config, data: frame.Data) -> list[Any]:
    return [_figure_gradients(config, data), _figure_training(config, data)]


CLAIMS = (
    frame.Claim(
        key="diverges",
        statement="A Post-LN transformer diverges at a learning rate that suits Pre-LN.",
        predicted="loss above chance, or not finite, at Pre-LN's best rate (the note)",
        judge=judges.judge_diverges,
        intuition="It does not blow up: shallow ones train, deep ones go quiet at the entropy of "
        "the labels. A flat loss at that number means that the input does not get through.",
    ),
    frame.Claim(
        key="stalls",
        statement="Deep Post-LN nets that fail stall at chance: they learn the labels' frequencies "
        "and nothing of the input.",
        predicted="loss = marginal entropy of the labels: 2.30 nats (digits), 3.25 (text)",
        judge=judges.judge_stalls,
        intuition="Compute the entropy of your labels once; a run that sits on it is this failure, "
        "not a slow start.",
    ),
    frame.Claim(
        key="warm_up",
        statement="Warm-up cures Post-LN.",
        predicted="with warm-up Post-LN trains wherever Pre-LN does (Xiong et al. 2020)",
        judge=judges.judge_warm_up,
        intuition="It buys about half a decade of learning rate, not all of what was lost.",
    ),
    frame.Claim(
        key="five_to_ten",
        statement="Post-LN needs a learning rate 5 to 10 times lower.",
        predicted="largest rate that trains: Pre-LN's over Post-LN's from 5 to 10 (the note)",
        judge=judges.judge_lower,
        intuition="The factor is a function of depth: one for a few blocks, more than ten for a "
        "dozen.",
    ),
    frame.Claim(
        key="last_gradient",
        statement="The gradient near the output is large for Post-LN and falls with depth for "
        "Pre-LN.",
        predicted="d / sqrt(3) and d / sqrt(2 + L): Xiong et al. 2020, theorem 1, with constants",
        judge=judges.judge_last,
    ),
    frame.Claim(
        key="root_depth",
        statement="Pre-LN's last gradient falls like 1 / sqrt(L).",
        predicted="exponent -1/2 (Xiong et al. 2020)",
        judge=judges.judge_root,
        intuition="The exponent is reached at depths nobody trains: test the formula, not the "
        "exponent.",
    ),
    frame.Claim(
        key="pre_flat",
        statement="Pre-LN gradients have the same size in all blocks.",
        predicted="first over last = 1; theory: sqrt(q_L / q_1), the stream grows",
        judge=judges.judge_flat,
        intuition="Early blocks get several times the gradient of late ones: that is where a "
        "Pre-LN spike starts.",
    ),
    frame.Claim(
        key="post_decays",
        statement="The gradient of Post-LN decays exponentially on its way down.",
        predicted="sqrt(2/3) a sublayer: the norm divides by sqrt(3/2) (Xiong et al. 2020)",
        judge=judges.judge_decay,
        intuition="The block gives back what its norm takes. What fades in a transformer is the "
        "part in which tokens differ, once attention has made them alike.",
    ),
    frame.Claim(
        key="two_modes",
        statement="Attention's averaging alone explains the gradient of a Post-LN transformer.",
        predicted="two modes: common to all tokens x 2 / (1 + m), the rest x 1 / (1 + m)",
        judge=judges.judge_modes,
    ),
    frame.Claim(
        key="stable_rate",
        statement="The largest stable learning rate is 2 over the Hessian's top eigenvalue.",
        predicted="gradient descent descends below 2 / lambda at first and not above",
        judge=judges.judge_stable,
        intuition="It is a lower bound in practice: descent that starts too fast moves to where "
        "the curvature is smaller.",
    ),
)


EXPERIMENT = frame.Experiment(
    name="pre_post_ln",
    question="Where does the norm belong: who trains, who stalls, who diverges?",
    claims=CLAIMS,
    presets={
        "tiny": Config(
            width=24, depth=8, seeds=3, tokens=8, blocks=4, stream=8, depths=(1, 3),
            rates=(0.003, 0.03), text_rates=(0.003, 0.03), warm=5, steps=10,
            batch=8, window=8, runs=2, stable_runs=2, stable_depth=1, stable_steps=5,
            factors=(0.5, 1.0, 4.0),
        ),
        "quick": Config(),
        "full": Config(
            width=512, depth=96, seeds=32, tokens=64, blocks=48, stream=128, depths=(2, 6, 12, 24),
            rates=(0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03),
            text_rates=(0.0001, 0.0003, 0.001, 0.003, 0.01), stable_depth=12, warm=500,
            steps=3000, batch=64, window=128, runs=5, stable_runs=5, stable_steps=200,
        ),
    },
    points=points,
    figures=figures,
)  # fmt: skip
