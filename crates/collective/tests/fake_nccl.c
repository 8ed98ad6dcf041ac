/* Imitates the calls of NCCL that the loader binds, with errors and hangs that a test asks for.
 * Compiled by tests/nccl.rs with the system's C compiler; each test loads a copy of its own. */
#include <stdatomic.h>
#include <stddef.h>
#include <string.h>
#include <unistd.h>

typedef struct { char internal[128]; } Id;
typedef struct {
  size_t size;
  unsigned int magic;
  unsigned int version;
  int blocking;
} Config;
typedef struct { int in_progress; int rank; int size; int dead; } Comm;

#ifndef VERSION
#define VERSION 22703
#endif
enum { SUCCESS = 0, INTERNAL = 3, IN_PROGRESS = 7 };

/* What a test sets and reads, by number: see `Knob` in tests/nccl.rs. */
static atomic_int knobs[32];
enum {
  INIT_RESULT, INIT_POLLS, ASYNC_ERROR, ABORT_HANGS, FINALIZE_POLLS, CALL_RESULT, CALL_POLLS,
  INITS, ABORTS, DESTROYS, FINALIZES, CALLS, POLLS, RANK, SIZE, FIRST_OF_ID, BLOCKING, CONFIG_SIZE,
  MAGIC, INSIDE, TWO_INSIDE, AFTER_DEATH, CALL_HANGS, IDS,
};
void fake_set(int knob, int value) { atomic_store(&knobs[knob], value); }
int fake_get(int knob) { return atomic_load(&knobs[knob]); }

/* NCCL allows one thread within a communicator, and none once it is gone. */
static void enter(Comm *comm) {
  if (atomic_fetch_add(&knobs[INSIDE], 1) > 0) fake_set(TWO_INSIDE, 1);
  if (comm->dead) fake_set(AFTER_DEATH, 1);
}
static void leave(void) { atomic_fetch_sub(&knobs[INSIDE], 1); }

int ncclGetVersion(int *version) { *version = VERSION; return SUCCESS; }
int ncclGetUniqueId(Id *id) {
  memset(id->internal, 0x5a, sizeof id->internal);
  id->internal[0] = (char)(atomic_fetch_add(&knobs[IDS], 1) + 1);
  return SUCCESS;
}

/* Communicators are never freed, so that one used too late is seen instead of crashing. */
static Comm comms[64];
int ncclCommInitRankConfig(Comm **comm, int size, Id id, int rank, Config *config) {
  int result = fake_get(INIT_RESULT);
  fake_set(RANK, rank);
  fake_set(SIZE, size);
  fake_set(FIRST_OF_ID, id.internal[0]);
  fake_set(BLOCKING, config->blocking);
  fake_set(CONFIG_SIZE, (int)config->size);
  fake_set(MAGIC, (int)config->magic);
  int number = atomic_fetch_add(&knobs[INITS], 1);
  if (result != SUCCESS) return result;
  *comm = &comms[number % 64];
  **comm = (Comm){ fake_get(INIT_POLLS), rank, size, 0 };
  return (*comm)->in_progress ? IN_PROGRESS : SUCCESS;
}

#ifndef WITHOUT_ASYNC_ERROR
/* A negative number of polls never ends. */
int ncclCommGetAsyncError(Comm *comm, int *error) {
  enter(comm);
  atomic_fetch_add(&knobs[POLLS], 1);
  *error = comm->in_progress ? IN_PROGRESS : fake_get(ASYNC_ERROR);
  if (comm->in_progress > 0) comm->in_progress--;
  leave();
  return SUCCESS;
}
#endif

int ncclCommAbort(Comm *comm) {
  enter(comm);
  comm->dead = 1;
  leave();
  while (fake_get(ABORT_HANGS)) usleep(1000);
  atomic_fetch_add(&knobs[ABORTS], 1);
  return SUCCESS;
}

int ncclCommFinalize(Comm *comm) {
  enter(comm);
  atomic_fetch_add(&knobs[FINALIZES], 1);
  comm->in_progress = fake_get(FINALIZE_POLLS);
  leave();
  return comm->in_progress ? IN_PROGRESS : SUCCESS;
}

int ncclCommDestroy(Comm *comm) {
  enter(comm);
  comm->dead = 1;
  leave();
  atomic_fetch_add(&knobs[DESTROYS], 1);
  return SUCCESS;
}

static int enqueued(Comm *comm) {
  enter(comm);
  while (fake_get(CALL_HANGS)) usleep(1000);
  atomic_fetch_add(&knobs[CALLS], 1);
  int result = fake_get(CALL_RESULT);
  if (result == SUCCESS) comm->in_progress = fake_get(CALL_POLLS);
  leave();
  return result != SUCCESS ? result : comm->in_progress ? IN_PROGRESS : SUCCESS;
}

static size_t width(int type) { return type == 7 ? 4 : type == 6 || type == 9 ? 2 : 0; }

/* The sum over one rank. */
int ncclAllReduce(const void *send, void *receive, size_t count, int type, int op, Comm *comm,
                  void *stream) {
  (void)stream;
  if (op != 0 || width(type) == 0) return 4;
  memmove(receive, send, count * width(type));
  return enqueued(comm);
}

/* As if every rank had the same. */
int ncclAllGather(const void *send, void *receive, size_t count, int type, Comm *comm,
                  void *stream) {
  (void)stream;
  if (width(type) == 0) return 4;
  for (int rank = 0; rank < comm->size; rank++)
    memcpy((char *)receive + (size_t)rank * count * width(type), send, count * width(type));
  return enqueued(comm);
}

const char *ncclGetErrorString(int result) { return result == 6 ? "remote\nerror" : "an error"; }
const char *ncclGetLastError(Comm *comm) { return comm && comm->rank == 1 ? "it was the wire" : ""; }

#if VERSION >= 22900
int ncclCommRevoke(Comm *comm, int flags) { (void)comm; (void)flags; return SUCCESS; }
#endif
/* There under a version that is not trusted with it yet. */
int ncclAlltoAll(void) { return INTERNAL; }
