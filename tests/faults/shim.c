// Preloaded: the n-th call (or each from the n-th on) of the system that has to do with a folder fails with an errno.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

static char folder[4096];
static int fault = 0, sticky = 0;
static long at = 0;  // 0: nothing fails, calls are counted
static atomic_long count;
static atomic_char ours[65536];  // descriptors of files in the folder

void shim_arm(const char* name, int number, long call, int on) {
    strncpy(folder, name, sizeof folder - 1);
    fault = number, at = call, sticky = on;
    atomic_store(&count, 0);
}
long shim_count(void) { return atomic_load(&count); }

static int in_folder(const char* path) { return folder[0] && path && strncmp(path, folder, strlen(folder)) == 0; }
static int is_ours(int fd) { return fd >= 0 && fd < 65536 && atomic_load(&ours[fd]); }
static int fails(int concerned) {
    if (!folder[0] || !concerned) return 0;
    long now = atomic_fetch_add(&count, 1) + 1;
    if (at == 0 || (sticky ? now < at : now != at)) return 0;
    errno = fault;
    return 1;
}
// A close tells an error of what was written: only then may it fail.
static int opened(int fd, int flags) {
    if (fd >= 0 && fd < 65536) atomic_store(&ours[fd], flags & O_ACCMODE ? 2 : 1);
    return fd;
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))
#define OPEN(name)                                                             \
    int name(const char* path, int flags, ...) {                               \
        va_list more;                                                          \
        va_start(more, flags);                                                 \
        mode_t mode = va_arg(more, mode_t);                                    \
        va_end(more);                                                          \
        if (!in_folder(path)) return REAL(name)(path, flags, mode);            \
        return fails(1) ? -1 : opened(REAL(name)(path, flags, mode), flags);          \
    }
#define OPENAT(name)                                                           \
    int name(int fd, const char* path, int flags, ...) {                       \
        va_list more;                                                          \
        va_start(more, flags);                                                 \
        mode_t mode = va_arg(more, mode_t);                                    \
        va_end(more);                                                          \
        if (!in_folder(path) && !is_ours(fd)) return REAL(name)(fd, path, flags, mode); \
        return fails(1) ? -1 : opened(REAL(name)(fd, path, flags, mode), flags);      \
    }
#define CALL(type, name, args, call, concerned) \
    type name args { return fails(concerned) ? -1 : REAL(name) call; }

OPEN(open)
OPEN(open64)
OPENAT(openat)
OPENAT(openat64)
CALL(ssize_t, write, (int fd, const void* data, size_t size), (fd, data, size), is_ours(fd))
CALL(ssize_t, writev, (int fd, const struct iovec* data, int size), (fd, data, size), is_ours(fd))
CALL(ssize_t, pwrite64, (int fd, const void* data, size_t size, off64_t to), (fd, data, size, to), is_ours(fd))
CALL(int, fsync, (int fd), (fd), is_ours(fd))
CALL(int, fdatasync, (int fd), (fd), is_ours(fd))
CALL(int, ftruncate64, (int fd, off64_t size), (fd, size), is_ours(fd))
CALL(int, rename, (const char* from, const char* to), (from, to), in_folder(from))
CALL(int, link, (const char* from, const char* to), (from, to), in_folder(from))
CALL(int, mkdir, (const char* path, mode_t mode), (path, mode), in_folder(path))
CALL(int, unlink, (const char* path), (path), in_folder(path))
CALL(int, unlinkat, (int fd, const char* path, int flags), (fd, path, flags), is_ours(fd) || in_folder(path))

int close(int fd) {
    int concerned = is_ours(fd) == 2;
    if (is_ours(fd)) atomic_store(&ours[fd], 0);
    int done = REAL(close)(fd);
    return fails(concerned) ? -1 : done;
}
