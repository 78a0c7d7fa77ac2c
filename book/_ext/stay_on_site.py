"""Keep every page of the book on its own site: no script from a third party.

Jupyter Book always enables sphinx-thebe, which adds to every page a script that names
an address on a CDN and throws where no Thebe button exists. The book has no such
button, so the scripts go.
"""


def drop_thebe(app, pagename, templatename, context, doctree):
    """Remove the scripts of sphinx-thebe from one page."""
    context["script_files"] = [
        script
        for script in context.get("script_files", [])
        if "thebe" not in f"{script} {getattr(script, 'attributes', '')}".lower()
    ]


def setup(app):
    app.connect("html-page-context", drop_thebe, priority=900)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
