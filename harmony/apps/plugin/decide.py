"""The operator that keeps and rejects by hand."""

import fiftyone.operators as foo
from fiftyone.operators import types
from fiftyone.operators.operator import RiskLevel

from harmony.apps.plugin.samples import (
    ComposeOperator,
    ask_choice,
    check_choice,
    find_work,
    list_ids,
    name_samples,
    place_button,
    read_param,
    warn_unselected,
)
from harmony.core.errors import UserError
from harmony.core.foreign import replace_surrogates
from harmony.data.sources.decisions import KEEP, REJECT, Decision, change_decisions, decisions_file, read_decisions
from harmony.data.sources.open_images.database import show_decisions
from harmony.data.sources.selection import BY_HAND, RULE_REASONS

FORGET = "as the rules say"
CHOICES = (KEEP, REJECT, FORGET)


class Decide(ComposeOperator):
    """Keeps or rejects the selected samples; the next preparation of the dataset respects it."""

    @property
    def config(self) -> foo.OperatorConfig:
        """How the App shows the operator."""
        return foo.OperatorConfig(
            name="decide",
            label="Keep or reject by hand",
            description="Decide on the selected samples; the next harmony.prepare of the dataset respects it",
            icon="rule",
            dynamic=True,
            risk_level=RiskLevel.MEDIUM,
        )

    def resolve_placement(self, ctx: foo.ExecutionContext) -> types.Placement:
        """The button above the grid."""
        return place_button("Keep or reject")

    def resolve_input(self, ctx: foo.ExecutionContext) -> types.Property:
        """The form: what to decide, and why."""
        inputs = types.Object()
        warn_unselected(ctx, inputs)
        ask_choice(inputs, "choice", CHOICES, REJECT, "Decision")
        if ctx.params.get("choice", REJECT) != FORGET:
            try:
                earlier = {
                    d.reason for d in read_decisions(decisions_file(find_work(ctx.dataset))).values() if d.reason
                }
            except UserError:
                earlier = set()
            view = types.AutocompleteView(choices=[types.Choice(reason, label=reason) for reason in sorted(earlier)])
            inputs.str("reason", label="Reason", description="In your words", view=view)
        return types.Property(inputs, view=types.View(label="Keep or reject the selected samples by hand"))

    def run(self, ctx: foo.ExecutionContext) -> str:
        """Write the decisions beside the dataset's work folder and show them in the field ``decision``."""
        choice, reason = check_choice(read_param(ctx, "choice", REJECT), CHOICES), read_reason(ctx)
        if choice == REJECT and not reason:
            raise UserError("a rejection needs a reason: say in a word or two what is wrong with the samples")
        file = decisions_file(find_work(ctx.dataset))
        samples = ctx.dataset.select(list_ids(ctx))
        rejections = dict(zip(*samples.values(["harmony_id", "rejected_because"]), strict=True))
        if None in rejections:
            raise UserError(f"some selected samples are not of the recipe of {ctx.dataset.name}: select others")
        keys = [key for key, old in rejections.items() if choice != KEEP or old in (None, BY_HAND, *RULE_REASONS)]
        unusable = [f"{key} ({rejections[key]})" for key in rejections if key not in keys]
        if not keys:
            raise UserError(f"no rule but its files or annotations reject {name_samples(unusable)}: mend those")
        decisions = change_decisions(file, dict.fromkeys(keys, None if choice == FORGET else Decision(choice, reason)))
        show_decisions(ctx.dataset, decisions)
        ctx.ops.reload_samples()
        counts = [sum(d.choice == each for d in decisions.values()) for each in (KEEP, REJECT)]
        line = f"{choice}: {name_samples(keys)}. By hand, {counts[0]} are kept and {counts[1]} rejected now ({file})"
        rest = f"; cannot be kept {name_samples(unusable)}" if unusable else ""
        return f"{line}{rest}. The next harmony.prepare of {ctx.dataset.name} applies it."


def read_reason(ctx: foo.ExecutionContext) -> str:
    """The reason of the form in one line that UTF-8 can write."""
    return " ".join(replace_surrogates(str(read_param(ctx, "reason", ""))).replace("\0", "").split())
