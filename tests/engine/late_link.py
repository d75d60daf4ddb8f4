"""A CPU's stand-in for the link between a host and its GPU."""

from __future__ import annotations


class LateCopy:
    """A copy that runs when somebody waits for it and no sooner, in the order of its stream; and its event."""

    def __init__(self, queue, sources, targets, after):
        self.queue, self.sources, self.targets, self.after = queue, sources, targets, after
        queue.append(self)

    def query(self):
        return self not in self.queue

    def synchronize(self):
        while self in self.queue:
            copy = self.queue.pop(0)
            for event in copy.after:
                event.synchronize()
            for source, target in zip(copy.sources, copy.targets, strict=True):
                target.copy_(source)
