"""TensorBoard's own reading of event files.

    event_files.py FOLDER...

Prints a JSON list with an object for each folder: the [step, value] pairs of each tag.
"""
import json
import sys

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


def scalars(folder):
    # 0: every value is kept, where by default a sample is.
    events = EventAccumulator(folder, size_guidance={'scalars': 0})
    events.Reload()
    return {tag: [[event.step, event.value] for event in events.Scalars(tag)] for tag in events.Tags()['scalars']}


print(json.dumps([scalars(folder) for folder in sys.argv[1:]]))
