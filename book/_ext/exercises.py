"""Number the exercises of each chapter from 1, in the order in which they stand."""


def number(app, env):
    """Replace the numbers that count through the whole book."""
    for kinds in env.toc_fignumbers.values():
        for place, label in enumerate(kinds.get("exercise", ()), 1):
            kinds["exercise"][label] = (place,)
    return []


def setup(app):
    # After Sphinx has numbered them.
    app.connect("env-get-updated", number, priority=900)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
