"""Reads sources for the tests."""


def texts(source, position=None):
    return [document.text for _, document in source.documents(position)]
