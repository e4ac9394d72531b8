"""stub"""


def to_datatree(*a, **k):
    raise NotImplementedError
