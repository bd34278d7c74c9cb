from smolseek.numerics import memory


def test_another_c_library_is_left_alone(monkeypatch):
    memory.keep_freed_memory()
    monkeypatch.setattr(memory.ctypes, "CDLL", lambda name: object())
    memory.keep_freed_memory()

    def missing(name):
        raise OSError

    monkeypatch.setattr(memory.ctypes, "CDLL", missing)
    memory.keep_freed_memory()
