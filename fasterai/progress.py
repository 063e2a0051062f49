"Show how far a long task is."


def progress(
    steps: list,
):
    "Return an iterable of the steps that shows fastprogress's bar, where that is installed."
    try:
        from fastprogress.fastprogress import progress_bar
    except ImportError:
        return steps
    return progress_bar(steps, leave=False)
