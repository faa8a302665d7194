"""Memory that several processes map: a memfd of fixed size, passed on by descriptor."""

class SharedMemory:
    fd: int  # the memfd, inheritable; pass it to a worker with pass_fds

    def close(self) -> None: ...
