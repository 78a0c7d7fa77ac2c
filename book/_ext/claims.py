"""What the chapters claim of training, with the evidence.

- the role ``claim`` puts what was measured behind a sentence, and leads to the list;
- the directive ``claims`` is that list, a table for each chapter.
"""

from functools import cache
from itertools import groupby

from docutils import nodes
from docutils.parsers.rst import Directive
from docutils.statemachine import StringList
from sphinx import addnodes

from minivit import experiments

claims = cache(experiments.claims)
load = cache(experiments.load)


def measured(claim):
    """The mean over seeds with its standard error."""
    found = claim.measure(load(claim.experiment))
    sign = "+" if claim.minus and found.mean > 0 else ""
    return f"{sign}{found} {claim.unit}".strip().replace("-", "−"), found.runs


def role(name, rawtext, text, lineno, inliner, options=None, content=None):
    """Put the evidence of a claim behind its sentence."""
    named = {claim.name: claim for claim in claims()}
    if text not in named:
        message = inliner.reporter.error(f"no claim is called {text!r}", line=lineno)
        return [inliner.problematic(rawtext, rawtext, message)], [message]
    figure, runs = measured(named[text])
    link = addnodes.pending_xref(
        rawtext,
        nodes.inline(rawtext, f"({figure}, {runs} seeds)", classes=["claim"]),
        refdomain="std",
        reftype="ref",
        reftarget=f"claim-{text}",
        refexplicit=True,
        refwarn=True,
        refdoc=inliner.document.settings.env.docname,
    )
    return [link], []


class Claims(Directive):
    """The list of all claims, a table for each chapter."""

    def run(self):
        env = self.state.document.settings.env
        places = env.get_domain("std").anonlabels
        tables = []
        for chapter, group in groupby(claims(), lambda claim: claim.chapter):
            group = list(group)
            rst = [".. list-table::", "   :header-rows: 1", "   :widths: 60 40", ""]
            rst += [f"   * - :doc:`{chapter}`", "     - measured, and what it must be"]
            for claim in group:
                figure, runs = measured(claim)
                rst += [f"   * - {claim.says}"]
                rst += [f"     - {figure} ({runs} seeds); ``{claim.describe()}``"]
            parent = nodes.container()
            self.state.nested_parse(StringList(rst, source="claims"), 0, parent)
            for claim, row in zip(group, list(parent.findall(nodes.row))[1:]):
                row["ids"].append(f"claim-{claim.name}")
                places[f"claim-{claim.name}"] = (env.docname, f"claim-{claim.name}")
            tables += parent.children
        return tables


def setup(app):
    app.add_role("claim", role)
    app.add_directive("claims", Claims)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
