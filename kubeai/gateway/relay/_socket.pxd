"""Reading from and writing to a connected socket without the event loop's buffers."""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_GET_SIZE

cdef extern from *:
    """
    #include <errno.h>
    #include <sys/socket.h>
    #include <sys/types.h>
    /* How many bytes the kernel accepted: 0 after an error too. */
    static inline ssize_t kb_send(int fd, const char *data, size_t size) {
        ssize_t sent;
        do {
            sent = send(fd, data, size, MSG_DONTWAIT | MSG_NOSIGNAL);
        } while (sent < 0 && errno == EINTR);
        return sent < 0 ? 0 : sent;
    }
    /* How many bytes were received: 0 at the end of the connection and after an error too. */
    static inline ssize_t kb_receive(int fd, char *to, size_t room) {
        ssize_t size;
        do {
            size = recv(fd, to, room, MSG_DONTWAIT);
        } while (size < 0 && errno == EINTR);
        return size < 0 ? 0 : size;
    }
    """
    Py_ssize_t kb_send(int fd, const char *data, size_t size) nogil
    Py_ssize_t kb_receive(int fd, char *to, size_t room) nogil


cdef inline int descriptor(object transport) except -2:
    """The descriptor of a transport's socket; -1: it has none."""
    cdef object sock = transport.get_extra_info("socket")
    return -1 if sock is None else sock.fileno()


cdef inline int write_at_once(object transport) except -1:
    """Pass each write to the kernel immediately.

    By default uvloop holds writes until it has handled everything that is ready: after a stall, it
    would process a whole backlog before sending the first of it. Writing is paused when the kernel
    does not accept all the data.
    """
    transport.set_write_buffer_limits(0)
    return 0


cdef inline int write_now(int fd, object transport, bytes data) except -1:
    """Write to a transport that has nothing buffered: at once, and buffer only the rest.

    The loop's own write makes the same system call, but its bookkeeping costs a stream of small
    chunks a tenth of its CPU. ``fd``: the transport's descriptor while it is open; -1: none. If
    the kernel reports an error, the transport meets it again and handles it.
    """
    cdef Py_ssize_t sent = 0
    if fd >= 0:
        sent = kb_send(fd, PyBytes_AS_STRING(data), PyBytes_GET_SIZE(data))
        if sent == PyBytes_GET_SIZE(data):
            return 0
    transport.write(data[sent:] if sent else data)
    return 0
