/* Requests at a fixed rate, and the mock engines that answer them, in one loop of one process.

   open_loop ENGINE_PORT CALLERS FRAMES

   FRAMES is a file of frames, each a 32-bit length (of this machine's order) and as many bytes:
   first the answer that every engine gives, then the requests, sent in turn. Engines listen on
   ENGINE_PORT of 127.0.0.1 to 127.0.0.4. Prints "ready", and then for each line "PORT RATE SECONDS"
   on standard input one line of JSON about a run against that port of 127.0.0.1, over CALLERS
   connections:

   RATE > 0   requests are due at fixed times, whether or not earlier ones are answered, and a
              request's latency counts from when it was due;
   RATE = 0   each caller asks again as soon as it is answered.

   Before that comes a tenth of the time of the latter as a warm-up: the proxy then has as many
   connections to its engines as it can need.

   "late_us" is how long after it was due a request was sent although a caller was free: this
   program's own share of a latency, but for what it takes to answer. It polls without sleeping, so
   that nobody has to wake it; it wants a core of its own. */

#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/tcp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum { ENGINES = 4, HEAD_BYTES = 4096, PIECE_BYTES = 1 << 16, EVENTS = 256, PATIENCE_S = 10 };

enum role { LISTENER, ENGINE, CALLER };

struct connection {
    int fd;
    enum role role;
    int head_bytes;     /* of the message that comes in: how much is in head */
    long body_bytes;    /* that are still to come; -1: the head is not whole */
    double due_s;
    char head[HEAD_BYTES];
};

struct frame {
    char *bytes;
    uint32_t size;
};

static struct frame *frames;
static int frame_count;
static int poller;

static struct connection **free_callers;
static int free_count;
static double *latencies_s, *late_s;
static size_t answered, sent, room; /* room: for how many values */
static double again_until_s; /* callers ask again as soon as they are answered */

static _Noreturn void fail(const char *what) {
    fprintf(stderr, "open_loop: %s: %s\n", what, errno ? strerror(errno) : "unexpected");
    exit(1);
}

static double now_s(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + (double)now.tv_nsec * 1e-9;
}

static void read_frames(const char *path) {
    FILE *file = fopen(path, "rb");
    uint32_t size;
    if (!file) fail(path);
    while (fread(&size, sizeof size, 1, file) == 1) {
        frames = realloc(frames, sizeof *frames * (size_t)(frame_count + 1));
        frames[frame_count] = (struct frame){malloc(size), size};
        if (fread(frames[frame_count++].bytes, 1, size, file) != size) fail(path);
    }
    if (frame_count < 2) fail("an answer and a request are wanted");
    fclose(file);
}

/* -- connections ------------------------------------------------------------------------------ */

static struct connection *watch(int fd, enum role role) {
    struct connection *connection = calloc(1, sizeof *connection);
    struct epoll_event event = {EPOLLIN, {.ptr = connection}};
    int on = 1;
    connection->fd = fd;
    connection->role = role;
    connection->body_bytes = -1;
    if (role != LISTENER) setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    if (epoll_ctl(poller, EPOLL_CTL_ADD, fd, &event)) fail("epoll_ctl");
    return connection;
}

static struct sockaddr_in address(int engine, int port) {
    return (struct sockaddr_in){
        .sin_family = AF_INET,
        .sin_port = htons((uint16_t)port),
        .sin_addr.s_addr = htonl(0x7f000001u + (uint32_t)engine),
    };
}

static void listen_on(int engine, int port) {
    struct sockaddr_in where = address(engine, port);
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0), on = 1;
    setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
    if (bind(fd, (struct sockaddr *)&where, sizeof where) || listen(fd, 1024)) fail("listen");
    watch(fd, LISTENER);
}

static struct connection *call(int port) {
    struct sockaddr_in where = address(0, port);
    int fd = socket(AF_INET, SOCK_STREAM, 0);
    if (connect(fd, (struct sockaddr *)&where, sizeof where)) fail("connect");
    return watch(fd, CALLER);
}

static void put(struct connection *connection, struct frame *frame) {
    /* Small enough for an empty socket's buffer: anything less is a fault of the setting. */
    if (send(connection->fd, frame->bytes, frame->size, MSG_NOSIGNAL) != (ssize_t)frame->size)
        fail("send");
}

/* -- messages --------------------------------------------------------------------------------- */

static void ask(struct connection *caller, double due_s) {
    caller->due_s = due_s;
    put(caller, &frames[1 + sent++ * 7 % (size_t)(frame_count - 1)]);
}

static void whole(struct connection *connection) {
    connection->head_bytes = 0;
    connection->body_bytes = -1;
    if (connection->role == ENGINE) {
        put(connection, &frames[0]);
        return;
    }
    double at_s = now_s();
    if (answered < room) latencies_s[answered++] = at_s - connection->due_s;
    if (at_s < again_until_s)
        ask(connection, at_s);
    else
        free_callers[free_count++] = connection;
}

/* A message is a head with a Content-Length and a body; each is asked for and answered alone. */
static void take(struct connection *connection, const char *data, long size) {
    if (connection->body_bytes < 0) {
        long before = connection->head_bytes;
        long copied = size < HEAD_BYTES - 1 - before ? size : HEAD_BYTES - 1 - before;
        memcpy(connection->head + before, data, (size_t)copied);
        connection->head_bytes += (int)copied;
        connection->head[connection->head_bytes] = 0;
        char *end = strstr(connection->head, "\r\n\r\n");
        if (!end) {
            if (copied < size) fail("a head is too long");
            return;
        }
        *end = 0;
        char *length = strcasestr(connection->head, "\r\ncontent-length:");
        if (!length) fail(connection->head);
        if (connection->role == CALLER && strncmp(connection->head, "HTTP/1.1 200", 12))
            fail(connection->head);
        connection->body_bytes = atol(length + 17);
        size -= end + 4 - connection->head - before;
    }
    connection->body_bytes -= size;
    if (connection->body_bytes < 0) fail("more than one message at once");
    if (connection->body_bytes == 0) whole(connection);
}

static void serve(struct connection *connection) {
    static char piece[PIECE_BYTES];
    if (connection->role == LISTENER) {
        int fd = accept4(connection->fd, NULL, NULL, 0);
        if (fd >= 0) watch(fd, ENGINE);
        return;
    }
    ssize_t size = recv(connection->fd, piece, sizeof piece, MSG_DONTWAIT);
    if (size > 0) {
        take(connection, piece, size);
    } else if (connection->role == ENGINE) {
        close(connection->fd);
        free(connection);
    } else {
        fail("a connection was closed on a caller");
    }
}

/* -- runs ------------------------------------------------------------------------------------- */

static int by_size(const void *left, const void *right) {
    double a = *(const double *)left, b = *(const double *)right;
    return (a > b) - (a < b);
}

static double quantile_us(double *values, size_t count, double share) {
    return count ? values[(size_t)((double)(count - 1) * share)] * 1e6 : 0;
}

static void handle_events(void) {
    struct epoll_event events[EVENTS];
    int ready = epoll_wait(poller, events, EVENTS, 0);
    for (int i = 0; i < ready; i++) serve(events[i].data.ptr);
}

/* All callers ask again and again. */
static void run_closed(int callers, double seconds) {
    double over_s = now_s() + seconds + PATIENCE_S;
    again_until_s = now_s() + seconds;
    answered = 0;
    while (free_count) ask(free_callers[--free_count], now_s());
    while (free_count < callers) {
        handle_events();
        if (now_s() > over_s) fail("requests were never answered");
    }
    again_until_s = 0;
}

/* Returns how many values of late_s there are. */
static size_t run_open(int callers, double rate, double seconds) {
    double began_s = now_s(), ends_s = began_s + seconds;
    size_t made = 0, lates = 0;
    answered = 0;
    for (;;) {
        double at_s = now_s();
        size_t due = (size_t)((at_s < ends_s ? at_s - began_s : seconds) * rate);
        while (made < due && free_count) {
            double due_s = began_s + (double)++made / rate;
            if (lates < room) late_s[lates++] = at_s - due_s;
            ask(free_callers[--free_count], due_s);
        }
        if (made < due) lates -= lates > 0; /* callers ran out, which is not this program's doing */
        if (made == due && at_s >= ends_s && free_count == callers) return lates;
        if (at_s > ends_s + PATIENCE_S) fail("requests were never answered");
        handle_events();
    }
}

static void run(int callers, double rate, double seconds) {
    size_t lates = 0;
    run_closed(callers, seconds / 10);
    if (rate > 0)
        lates = run_open(callers, rate, seconds);
    else
        run_closed(callers, seconds);
    qsort(latencies_s, answered, sizeof *latencies_s, by_size);
    qsort(late_s, lates, sizeof *late_s, by_size);
    printf("{\"p50_us\": %.1f, \"p99_us\": %.1f, \"p999_us\": %.1f, \"late_p50_us\": %.1f, "
           "\"late_p99_us\": %.1f, \"rate\": %.1f}\n",
           quantile_us(latencies_s, answered, 0.5), quantile_us(latencies_s, answered, 0.99),
           quantile_us(latencies_s, answered, 0.999), quantile_us(late_s, lates, 0.5),
           quantile_us(late_s, lates, 0.99), (double)answered / seconds);
    fflush(stdout);
}

int main(int count, char **arguments) {
    char line[128];
    if (count != 4) fail("ENGINE_PORT CALLERS FRAMES");
    int callers = atoi(arguments[2]);
    read_frames(arguments[3]);
    poller = epoll_create1(0);
    for (int engine = 0; engine < ENGINES; engine++) listen_on(engine, atoi(arguments[1]));
    puts("ready");
    fflush(stdout);
    free_callers = calloc((size_t)callers, sizeof *free_callers);
    while (fgets(line, sizeof line, stdin)) {
        int port;
        double rate, seconds;
        if (sscanf(line, "%d %lf %lf", &port, &rate, &seconds) != 3) fail(line);
        room = (size_t)((rate > 0 ? rate : 200000) * seconds) + 1;
        latencies_s = calloc(room, sizeof *latencies_s);
        late_s = calloc(room, sizeof *late_s);
        for (free_count = 0; free_count < callers; free_count++)
            free_callers[free_count] = call(port);
        run(callers, rate, seconds);
        for (int i = 0; i < callers; i++) {
            close(free_callers[i]->fd);
            free(free_callers[i]);
        }
        free(latencies_s);
        free(late_s);
    }
    return 0;
}
