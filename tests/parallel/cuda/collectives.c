/* A collective library for the tests' stand-ins: device memory is host memory, ranks meet in a shared file. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>
#define SLOT (1u << 20)
#define MOST 8
typedef struct { volatile int arrived, phase, full[MOST][MOST]; char pad[64]; char slots[MOST][SLOT], mail[MOST][MOST][SLOT]; } Shared;
typedef struct { Shared *shared; int ranks, rank; } Comm;
static size_t width(int t) { return t < 2 ? 1 : t < 4 ? 4 : t < 6 ? 8 : t == 6 || t == 9 ? 2 : t == 7 ? 4 : 8; }
static void nap(void) { struct timespec t = {0, 20000}; nanosleep(&t, 0); }
static void barrier(Comm *c) {
  int phase = c->shared->phase;
  if (__sync_add_and_fetch(&c->shared->arrived, 1) == c->ranks) { c->shared->arrived = 0; __sync_synchronize(); c->shared->phase = phase + 1; }
  else while (c->shared->phase == phase) nap();
  __sync_synchronize();
}
int ncclGetUniqueId(char *id) { static int n; memset(id, 0, 128); struct timeval t; gettimeofday(&t, 0); sprintf(id, "/dev/shm/stand_in_%d_%d_%ld", getpid(), n++, (long)t.tv_usec); return 0; }
typedef struct { char name[128]; } Id;
int ncclCommInitRank(Comm **out, int ranks, Id id, int rank) {
  Comm *c = malloc(sizeof *c); c->ranks = ranks; c->rank = rank;
  int f = open(id.name, O_RDWR | O_CREAT, 0600); if (ftruncate(f, sizeof(Shared))) return 1;
  c->shared = mmap(0, sizeof(Shared), PROT_READ | PROT_WRITE, MAP_SHARED, f, 0); close(f);
  barrier(c); unlink(id.name); *out = c; return 0;
}
static void fold(char *to, const char *from, size_t n, int type, int op) {
#define EACH(T) for (size_t i = 0; i < n; i++) { T *a = (T *)to + i, b = ((const T *)from)[i]; *a = op == 0 ? *a + b : op == 1 ? *a * b : op == 2 ? (b > *a ? b : *a) : (b < *a ? b : *a); } break;
  switch (type) { case 0: EACH(signed char) case 1: EACH(unsigned char) case 2: EACH(int) case 3: EACH(unsigned) case 4: EACH(long) case 5: EACH(unsigned long) case 6: EACH(_Float16) case 7: EACH(float) case 8: EACH(double) }
}
int ncclAllReduce(const char *s, char *d, size_t n, int type, int op, Comm *c) {
  size_t w = width(type), step = SLOT / w;
  for (size_t at = 0; at < n; at += step) {
    size_t m = n - at < step ? n - at : step;
    memcpy(c->shared->slots[c->rank], s + at * w, m * w); barrier(c);
    static char sum[SLOT]; memcpy(sum, c->shared->slots[0], m * w);
    for (int r = 1; r < c->ranks; r++) fold(sum, c->shared->slots[r], m, type, op);
    memcpy(d + at * w, sum, m * w); barrier(c);
  }
  return 0;
}
int ncclAllGather(const char *s, char *d, size_t n, int type, Comm *c) {
  size_t w = width(type), step = SLOT / w;
  for (size_t at = 0; at < n; at += step) {
    size_t m = n - at < step ? n - at : step;
    memcpy(c->shared->slots[c->rank], s + at * w, m * w); barrier(c);
    for (int r = 0; r < c->ranks; r++) memcpy(d + (r * n + at) * w, c->shared->slots[r], m * w);
    barrier(c);
  }
  return 0;
}
int ncclReduceScatter(const char *s, char *d, size_t n, int type, int op, Comm *c) {
  char *all = malloc(n * c->ranks * width(type)); ncclAllReduce(s, all, n * c->ranks, type, op, c);
  memcpy(d, all + c->rank * n * width(type), n * width(type)); free(all); return 0;
}
int ncclBroadcast(const char *s, char *d, size_t n, int type, int root, Comm *c) {
  size_t w = width(type), step = SLOT / w;
  for (size_t at = 0; at < n; at += step) {
    size_t m = n - at < step ? n - at : step;
    if (c->rank == root) memcpy(c->shared->slots[root], s + at * w, m * w);
    barrier(c); memcpy(d + at * w, c->shared->slots[root], m * w); barrier(c);
  }
  return 0;
}
int ncclSend(const char *s, size_t n, int type, int peer, Comm *c) {
  size_t w = width(type), step = SLOT / w; volatile int *full = &c->shared->full[c->rank][peer];
  for (size_t at = 0; at < n; at += step) {
    size_t m = n - at < step ? n - at : step; while (*full) nap();
    memcpy(c->shared->mail[c->rank][peer], s + at * w, m * w); __sync_synchronize(); *full = 1;
  }
  return 0;
}
int ncclRecv(char *d, size_t n, int type, int peer, Comm *c) {
  size_t w = width(type), step = SLOT / w; volatile int *full = &c->shared->full[peer][c->rank];
  for (size_t at = 0; at < n; at += step) {
    size_t m = n - at < step ? n - at : step; while (!*full) nap();
    memcpy(d + at * w, c->shared->mail[peer][c->rank], m * w); __sync_synchronize(); *full = 0;
  }
  return 0;
}
int ncclCommAbort(Comm *c) { return 0; }
int ncclGroupStart(void) { return 0; }
int ncclGroupEnd(void) { return 0; }
