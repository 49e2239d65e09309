#define _GNU_SOURCE
#include "connection.h"

#include "failure.h"
#include "hot.h"
#include "protocol.h"

#include <errno.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

#define RECEIVE_BYTES 65536

void connection_init(connection *peer)
{
    memset(peer, 0, sizeof *peer);
    peer->fd = peer->process = -1;
}

static int has_ended(int process)
{
    struct pollfd watched = {.fd = process, .events = POLLIN};
    return process >= 0 && poll(&watched, 1, 0) > 0;
}

/* A descriptor that becomes readable when a process ends; -1 where there is nothing to watch: this very process, one of
   another pid namespace (which the kernel calls 0), a kernel that has no such descriptors. */
static int open_process(pid_t pid, int *gone)
{
    *gone = 0;
    if (pid == 0 || pid == getpid())
        return -1;
    int process = (int)syscall(SYS_pidfd_open, pid, 0);
    *gone = process < 0 && errno == ESRCH;
    return process;
}

connection_attempt connection_open(connection *peer, const agent_address *address, handoff_error *error)
{
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0); /* connecting may wait, too */
    if (fd < 0) {
        fail_errno(error, "DescriptorLimitError", "cannot open a socket to the agent");
        return CONNECTION_REFUSED;
    }
    if (connect(fd, (const struct sockaddr *)&address->address, address->length) < 0) {
        int number = errno;
        close(fd);
        if (number == ECONNREFUSED || number == ENOENT || number == EAGAIN || number == EINTR)
            return NOBODY_THERE;
        fail(error, "ConfigurationError",
             "cannot connect to the agent at %s: %s; give a path that this user may write to, the same on both sides "
             "(DEISA_RAY_SOCKET_PATH)",
             address->shown, strerror(number));
        return CONNECTION_REFUSED;
    }
    struct ucred other;
    socklen_t length = sizeof other;
    if (getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &other, &length) < 0) {
        close(fd);
        return NOBODY_THERE;
    }
    if (other.uid != getuid()) {
        close(fd);
        fail(error, "PeerIdentityError",
             "the process at the other end of the agent's socket (pid %d) belongs to user id %u, this one to %u; simulation "
             "and analytics must run as the same user",
             (int)other.pid, (unsigned)other.uid, (unsigned)getuid());
        return CONNECTION_REFUSED;
    }
    int gone, process = open_process(other.pid, &gone);
    if (gone || has_ended(process)) {
        if (process >= 0)
            close(process);
        close(fd);
        return NOBODY_THERE;
    }
    connection_close(peer);
    peer->fd = fd;
    peer->process = process;
    return CONNECTED;
}

int connection_send(connection *peer, const wire_out *message, size_t *sent)
{
    while (*sent < message->length) {
        ssize_t now = send(peer->fd, message->data + *sent, message->length - *sent, MSG_NOSIGNAL | MSG_DONTWAIT);
        if (now < 0 && (errno == EAGAIN || errno == EWOULDBLOCK || errno == EINTR))
            return has_ended(peer->process) ? -1 : 0; /* a child of it may keep the connection open */
        if (now < 0)
            return -1;
        *sent += (size_t)now;
    }
    return 1;
}

HOT void connection_send_now(connection *peer, const wire_out *message)
{
    if (peer->fd >= 0)
        (void)!send(peer->fd, message->data, message->length, MSG_NOSIGNAL | MSG_DONTWAIT);
}

static void keep_descriptors(connection *peer, struct msghdr *message)
{
    for (struct cmsghdr *part = CMSG_FIRSTHDR(message); part != NULL; part = CMSG_NXTHDR(message, part)) {
        if (part->cmsg_level != SOL_SOCKET || part->cmsg_type != SCM_RIGHTS)
            continue;
        size_t count = (part->cmsg_len - CMSG_LEN(0)) / sizeof(int);
        for (size_t i = 0; i < count; i++) {
            int fd;
            memcpy(&fd, CMSG_DATA(part) + i * sizeof fd, sizeof fd);
            if (peer->descriptor_count < CONNECTION_MOST_DESCRIPTORS)
                peer->descriptors[peer->descriptor_count++] = fd;
            else
                close(fd);
        }
    }
}

int connection_receive(connection *peer)
{
    if (peer->handled > 0)
        memmove(peer->received, peer->received + peer->handled, peer->length - peer->handled);
    peer->length -= peer->handled;
    peer->handled = 0;
    if (peer->capacity - peer->length < RECEIVE_BYTES) {
        unsigned char *larger = realloc(peer->received, peer->length + 2 * RECEIVE_BYTES);
        if (larger == NULL)
            return -1;
        peer->received = larger;
        peer->capacity = peer->length + 2 * RECEIVE_BYTES;
    }
    union {
        struct cmsghdr aligned;
        char bytes[CMSG_SPACE(PROTOCOL_MAX_DESCRIPTORS * sizeof(int))];
    } control;
    struct iovec data = {peer->received + peer->length, RECEIVE_BYTES};
    struct msghdr message = {.msg_iov = &data, .msg_iovlen = 1, .msg_control = &control, .msg_controllen = sizeof control};
    ssize_t got = recvmsg(peer->fd, &message, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
    if (got < 0 && (errno == EAGAIN || errno == EWOULDBLOCK || errno == EINTR))
        return has_ended(peer->process) ? -1 : 0; /* a child of it may keep the connection open */
    if (got <= 0)
        return -1;
    keep_descriptors(peer, &message);
    peer->length += (size_t)got;
    return 1;
}

int connection_next(connection *peer, uint16_t *code, wire_in *fields)
{
    size_t there = peer->length - peer->handled;
    if (there < 4)
        return 0;
    const unsigned char *start = peer->received + peer->handled;
    size_t length = wire_announced(start);
    if (length > PROTOCOL_MAX_MESSAGE_BYTES || length < 2)
        return -1;
    if (there < 4 + length)
        return 0;
    *fields = wire_of(start + 4, length);
    *code = wire_get_code(fields);
    peer->handled += 4 + length;
    return 1;
}

static int wait_for(connection *peer, short event, double seconds)
{
    struct pollfd watched[] = {{.fd = peer->fd, .events = event}, {.fd = peer->process, .events = POLLIN}};
    return poll(watched, 2, seconds <= 0 ? 0 : (int)(1000 * seconds) + 1) > 0;
}

int connection_wait(connection *peer, double seconds)
{
    return wait_for(peer, POLLIN, seconds);
}

HOT int connection_has_news(const connection *peer)
{
    struct pollfd watched = {.fd = peer->fd, .events = POLLIN};
    return poll(&watched, 1, 0) > 0;
}

void connection_wait_for_room(connection *peer, double seconds)
{
    wait_for(peer, POLLOUT, seconds);
}

int connection_take(connection *peer, int *descriptors, size_t count)
{
    size_t taken = count < peer->descriptor_count ? count : peer->descriptor_count;
    memcpy(descriptors, peer->descriptors, taken * sizeof *descriptors);
    peer->descriptor_count -= taken;
    memmove(peer->descriptors, peer->descriptors + taken, peer->descriptor_count * sizeof *descriptors);
    if (taken == count)
        return 0;
    while (taken > 0)
        close(descriptors[--taken]);
    return -1;
}

void connection_close_in_child(connection *peer)
{
    if (peer->fd >= 0)
        close(peer->fd);
    if (peer->process >= 0)
        close(peer->process);
    while (peer->descriptor_count > 0)
        close(peer->descriptors[--peer->descriptor_count]);
    peer->fd = peer->process = -1;
}

void connection_close(connection *peer)
{
    connection_close_in_child(peer);
    free(peer->received);
    connection_init(peer);
}
