/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * The work that the protected guest does, and the judge of its disks.
 *
 *   worker CHANNEL DATABASE DEVICE:FIRST:BLOCKS:BUSY...
 *
 * One process commits SQLite transactions through Debian's sqlite3.  One
 * process for each DEVICE writes numbered 4 KiB blocks past the page cache and
 * reads them back: first all BLOCKS, from FIRST on, then the first BUSY of them
 * again and again.  Each remembers in its own memory what it
 * wrote.  That memory and the disk travel to the other host by different
 * ways (COLO's checkpoints and the replication driver), so any difference
 * between the two is a lost, old or foreign block.
 *
 * On CHANNEL a line is written every BEAT_MS.  "check" read from it makes each
 * process check all that it ever wrote, and go on; "finish" ends the work with
 * such a check and a report.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <termios.h>
#include <time.h>
#include <unistd.h>
#include <zlib.h>

#define BEAT_MS 100
#define BLOCK 4096
#define WORDS (BLOCK / sizeof(uint64_t))
#define MAGIC 0x4f4c4f436f6d6564ull
#define MAX_REGIONS 64
#define MANY_BLOCKS 64      /* first fill and check: 256 KiB a request */
#define SLOTS 64            /* rows that SQLite updates over and over */
#define READ_BACK_EVERY 8   /* transactions between two reads of old rows */
#define LINE 256

struct region {
    const char *device;
    uint64_t first;
    uint32_t blocks;
    uint32_t busy;
    _Atomic bool filled;
    _Atomic uint64_t writes;
    _Atomic uint64_t reads;
    _Atomic uint64_t wrong;
    _Atomic uint64_t checks;
    uint32_t digest;
};

/* Shared by all processes; each field has one writer. */
struct shared {
    _Atomic bool stop;
    _Atomic bool sql_ready;
    _Atomic uint64_t tx;
    _Atomic uint64_t sql_wrong;
    _Atomic uint64_t sql_checks;
    _Atomic uint64_t checks_wanted;
    int regions;
    struct region region[MAX_REGIONS];
};

/* The first words of a block; the rest follows from number and generation. */
struct header {
    uint64_t magic;
    uint64_t number;
    uint64_t generation;
    uint64_t crc;           /* zlib's, of the block with this field zero */
};

static struct shared *shared;
static int channel = -1;

static void say(const char *format, ...)
    __attribute__((format(printf, 1, 2)));

/* One write for a line: the processes share the channel. */
static void say(const char *format, ...)
{
    char line[LINE];
    va_list args;
    int length;

    va_start(args, format);
    length = vsnprintf(line, sizeof(line) - 1, format, args);
    va_end(args);
    if (length > (int)sizeof(line) - 2) {
        length = sizeof(line) - 2;
    }
    line[length++] = '\n';
    if (write(channel, line, length) != length) {
        exit(3);
    }
}

static void __attribute__((noreturn)) die(const char *what)
{
    say("FAIL %s: %s", what, strerror(errno));
    exit(2);
}

static uint64_t now_ms(void)
{
    struct timespec ts;

    clock_gettime(CLOCK_MONOTONIC, &ts);
    return ts.tv_sec * 1000ull + ts.tv_nsec / 1000000;
}

static uint64_t mix(uint64_t x)
{
    x += 0x9e3779b97f4a7c15ull;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
    return x ^ (x >> 31);
}

static void *aligned(size_t size)
{
    void *p = NULL;

    if (posix_memalign(&p, BLOCK, size)) {
        die("memory");
    }
    return p;
}

/* Raw blocks */

static void fill(uint64_t *block, uint64_t number, uint64_t generation)
{
    struct header *header = (struct header *)block;
    uint64_t seed = mix(number << 32 ^ generation);

    for (size_t i = sizeof(*header) / sizeof(*block); i < WORDS; i++) {
        seed = seed * 6364136223846793005ull + 1442695040888963407ull;
        block[i] = seed;
    }
    *header = (struct header) {
        .magic = MAGIC, .number = number, .generation = generation,
    };
    header->crc = crc32(0, (const Bytef *)block, BLOCK);
}

static void wrong_block(struct region *r, uint32_t number,
                        uint32_t generation, const uint64_t *block)
{
    const struct header *found = (const struct header *)block;

    if (atomic_fetch_add(&r->wrong, 1) < 10) {
        say("WRONG dev=%s block=%u expected=%u found=%llu/%llu%s", r->device,
            number, generation, (unsigned long long)found->number,
            (unsigned long long)found->generation,
            found->magic == MAGIC ? "" : " (not a block of ours)");
    }
}

/* Check @count blocks from @number on; @have has room for them */
static void check(struct region *r, int fd, uint32_t number, uint32_t count,
                  const uint32_t *generation, uint64_t *have, uint64_t *want)
{
    if (pread(fd, have, count * BLOCK, (r->first + number) * BLOCK) !=
        (ssize_t)count * BLOCK) {
        die("read of blocks");
    }
    for (uint32_t i = 0; i < count; i++) {
        fill(want, number + i, generation[number + i]);
        if (memcmp(have + i * WORDS, want, BLOCK)) {
            wrong_block(r, number + i, generation[number + i],
                        have + i * WORDS);
        }
    }
}

static void check_all(struct region *r, int fd, const uint32_t *generation,
                      uint64_t *have, uint64_t *want)
{
    for (uint32_t at = 0; at < r->blocks; at += MANY_BLOCKS) {
        uint32_t n = r->blocks - at < MANY_BLOCKS ? r->blocks - at
                                                  : MANY_BLOCKS;

        check(r, fd, at, n, generation, have, want);
    }
}

static void first_fill(struct region *r, int fd, uint32_t *generation)
{
    uint64_t *buffer = aligned(MANY_BLOCKS * BLOCK);

    for (uint32_t at = 0; at < r->blocks; at += MANY_BLOCKS) {
        uint32_t n = r->blocks - at < MANY_BLOCKS ? r->blocks - at
                                                  : MANY_BLOCKS;

        for (uint32_t i = 0; i < n; i++) {
            generation[at + i] = 1;
            fill(buffer + i * WORDS, at + i, 1);
        }
        if (pwrite(fd, buffer, n * BLOCK, (r->first + at) * BLOCK) !=
            (ssize_t)n * BLOCK) {
            die("first fill");
        }
    }
    free(buffer);
    atomic_store(&r->filled, true);
}

static void block_work(struct region *r)
{
    const struct timespec pause = { .tv_nsec = 1000000 };
    uint32_t *generation = calloc(r->blocks, sizeof(*generation));
    uint64_t *have = aligned(MANY_BLOCKS * BLOCK), *want = aligned(BLOCK);
    uint64_t random = mix(getpid());
    int fd = open(r->device, O_RDWR | O_DIRECT);

    if (fd < 0 || !generation) {
        die(r->device);
    }
    first_fill(r, fd, generation);

    while (!atomic_load(&shared->stop)) {
        random = mix(random);
        bool writes = random & 1;
        uint32_t number = (random >> 1) % (writes ? r->busy : r->blocks);

        if (writes) {
            fill(want, number, ++generation[number]);
            if (pwrite(fd, want, BLOCK, (r->first + number) * BLOCK) !=
                BLOCK) {
                die("write of a block");
            }
            atomic_fetch_add(&r->writes, 1);
        } else {
            check(r, fd, number, 1, generation, have, want);
            atomic_fetch_add(&r->reads, 1);
        }
        if (atomic_load(&r->checks) < atomic_load(&shared->checks_wanted)) {
            check_all(r, fd, generation, have, want);
            atomic_fetch_add(&r->checks, 1);
        }
        /* Two guests and two QEMUs may share two CPUs: leave some of them. */
        nanosleep(&pause, NULL);
    }

    check_all(r, fd, generation, have, want);
    if (fsync(fd)) {
        die("fsync");
    }
    r->digest = crc32(0, (const Bytef *)generation,
                      r->blocks * sizeof(*generation));
}

/* SQLite */

struct sqlite {
    pid_t pid;
    FILE *to;
    FILE *from;
};

static struct sqlite sqlite_start(const char *database)
{
    struct sqlite s;
    int to[2], from[2];

    if (pipe2(to, O_CLOEXEC) || pipe2(from, O_CLOEXEC)) {
        die("pipe");
    }
    s.pid = fork();
    if (s.pid < 0) {
        die("fork");
    }
    if (s.pid == 0) {
        dup2(to[0], STDIN_FILENO);
        dup2(from[1], STDOUT_FILENO);
        dup2(from[1], STDERR_FILENO);
        execlp("sqlite3", "sqlite3", "-batch", "-bail", "-init", "/dev/null",
               database, NULL);
        _exit(127);
    }
    close(to[0]);
    close(from[1]);
    s.to = fdopen(to[1], "w");
    s.from = fdopen(from[0], "r");
    if (!s.to || !s.from) {
        die("fdopen");
    }
    setlinebuf(s.to);
    return s;
}

static void sqlite_end(struct sqlite *s)
{
    fclose(s->to);
    fclose(s->from);
    waitpid(s->pid, NULL, 0);
}

/* The next line that sqlite3 prints; it has nothing to say only when ended. */
static char *sqlite_line(struct sqlite *s, char *line)
{
    if (!fgets(line, LINE, s->from)) {
        say("FAIL sqlite3 ended");
        exit(2);
    }
    line[strcspn(line, "\n")] = '\0';
    return line;
}

static void sql_wrong(const char *have, const char *want)
{
    if (atomic_fetch_add(&shared->sql_wrong, 1) < 10) {
        say("WRONG sql have='%s' expected='%s'", have, want);
    }
}

static void sqlite_expect(struct sqlite *s, const char *want)
{
    char line[LINE];

    if (strcmp(sqlite_line(s, line), want)) {
        sql_wrong(line, want);
    }
}

static unsigned long long row_value(uint64_t id)
{
    return mix(id) >> 1;
}

static void sqlite_commit(struct sqlite *s, uint64_t id)
{
    char want[LINE];

    fprintf(s->to, "BEGIN; INSERT INTO log VALUES(%llu, %llu); "
            "UPDATE slot SET n = %llu WHERE k = %llu; COMMIT; "
            "SELECT 'committed', %llu;\n",
            (unsigned long long)id, row_value(id), (unsigned long long)id,
            (unsigned long long)id % SLOTS, (unsigned long long)id);
    snprintf(want, sizeof(want), "committed|%llu", (unsigned long long)id);
    sqlite_expect(s, want);
}

static void sqlite_read_back(struct sqlite *s, uint64_t id)
{
    char want[LINE];

    fprintf(s->to, "SELECT v FROM log WHERE id = %llu;\n",
            (unsigned long long)id);
    snprintf(want, sizeof(want), "%llu", row_value(id));
    sqlite_expect(s, want);
}

/* The last transaction that wrote slot k, after transactions 1 to last. */
static uint64_t slot_value(uint64_t k, uint64_t last)
{
    uint64_t back = (last % SLOTS + SLOTS - k) % SLOTS;

    return last > back ? last - back : 0;
}

static void drop_caches(void)
{
    int fd = open("/proc/sys/vm/drop_caches", O_WRONLY);

    sync();
    if (fd < 0 || write(fd, "3", 1) != 1) {
        die("drop_caches");
    }
    close(fd);
}

/* From the disk, by an sqlite3 that has cached nothing. */
static void sql_verify(const char *database, uint64_t last)
{
    struct sqlite s;
    char line[LINE], integrity[LINE], want[LINE];
    uint64_t rows = 0;

    drop_caches();
    s = sqlite_start(database);
    fputs("PRAGMA integrity_check(1);\n", s.to);
    sqlite_line(&s, integrity);
    fputs("SELECT id, v FROM log ORDER BY id; SELECT 'rows';\n", s.to);
    while (strcmp(sqlite_line(&s, line), "rows")) {
        rows++;
        snprintf(want, sizeof(want), "%llu|%llu", (unsigned long long)rows,
                 row_value(rows));
        if (strcmp(line, want)) {
            sql_wrong(line, want);
        }
    }
    fputs("SELECT n FROM slot ORDER BY k;\n", s.to);
    for (uint64_t k = 0; k < SLOTS; k++) {
        snprintf(want, sizeof(want), "%llu",
                 (unsigned long long)slot_value(k, last));
        sqlite_expect(&s, want);
    }
    sqlite_end(&s);
    say("SQL integrity=%s committed=%llu rows=%llu wrong=%llu",
        strcmp(integrity, "ok") ? "bad" : "ok", (unsigned long long)last,
        (unsigned long long)rows,
        (unsigned long long)atomic_load(&shared->sql_wrong));
}

static void sql_work(const char *database)
{
    struct sqlite s = sqlite_start(database);
    uint64_t id = 0, random = 1;

    fprintf(s.to, "PRAGMA synchronous=FULL; "
            "CREATE TABLE log(id INTEGER PRIMARY KEY, v INTEGER); "
            "CREATE TABLE slot(k INTEGER PRIMARY KEY, n INTEGER); "
            "WITH RECURSIVE c(k) AS (SELECT 0 UNION ALL SELECT k + 1 FROM c "
            "WHERE k < %d) INSERT INTO slot SELECT k, 0 FROM c; "
            "SELECT 'ready';\n", SLOTS - 1);
    sqlite_expect(&s, "ready");
    atomic_store(&shared->sql_ready, true);

    while (!atomic_load(&shared->stop)) {
        sqlite_commit(&s, ++id);
        atomic_store(&shared->tx, id);
        if (id % READ_BACK_EVERY == 0) {
            random = mix(random);
            sqlite_read_back(&s, 1 + random % id);
        }
        if (atomic_load(&shared->sql_checks) <
            atomic_load(&shared->checks_wanted)) {
            sql_verify(database, id);
            atomic_fetch_add(&shared->sql_checks, 1);
        }
    }
    sqlite_end(&s);
    sql_verify(database, id);
}

/* The parent */

static void parse_region(char *text, struct region *r)
{
    char *numbers = strchr(text, ':');
    unsigned long long first;

    if (!numbers || sscanf(numbers, ":%llu:%u:%u", &first, &r->blocks,
                            &r->busy) != 3 || !r->busy) {
        errno = EINVAL;
        die(text);
    }
    *numbers = '\0';
    r->device = text;
    r->first = first;
}

static void beat(uint64_t number)
{
    uint64_t writes = 0, reads = 0, wrong = 0;
    bool ready = atomic_load(&shared->sql_ready);

    for (int i = 0; i < shared->regions; i++) {
        struct region *r = &shared->region[i];

        ready = ready && atomic_load(&r->filled);
        writes += atomic_load(&r->writes);
        reads += atomic_load(&r->reads);
        wrong += atomic_load(&r->wrong);
    }
    say("BEAT n=%llu ready=%d tx=%llu writes=%llu reads=%llu wrong=%llu",
        (unsigned long long)number, ready,
        (unsigned long long)atomic_load(&shared->tx),
        (unsigned long long)writes, (unsigned long long)reads,
        (unsigned long long)(wrong + atomic_load(&shared->sql_wrong)));
}

/* Take what the host has sent; true once that was "finish". */
static bool told_to_finish(void)
{
    static char line[LINE];
    static size_t length;
    char c;

    while (read(channel, &c, 1) == 1) {
        if (c == '\n' || c == '\r') {
            line[length] = '\0';
            length = 0;
            if (!strcmp(line, "finish")) {
                return true;
            }
            if (!strcmp(line, "check")) {
                atomic_fetch_add(&shared->checks_wanted, 1);
            }
        } else if (length < sizeof(line) - 1) {
            line[length++] = c;
        }
    }
    return false;
}

/* Say it when all processes have made a check that the host asked for. */
static void report_checks(void)
{
    static uint64_t reported;
    uint64_t done = atomic_load(&shared->sql_checks);
    uint64_t wrong = atomic_load(&shared->sql_wrong);
    uint64_t blocks = 0;

    for (int i = 0; i < shared->regions; i++) {
        struct region *r = &shared->region[i];
        uint64_t checks = atomic_load(&r->checks);

        done = checks < done ? checks : done;
        wrong += atomic_load(&r->wrong);
        blocks += r->blocks;
    }
    if (done > reported) {
        reported = done;
        say("CHECKED n=%llu blocks=%llu wrong=%llu", (unsigned long long)done,
            (unsigned long long)blocks, (unsigned long long)wrong);
    }
}

static void beat_until_finish(void)
{
    struct pollfd in = { .fd = channel, .events = POLLIN };
    uint64_t next = now_ms(), number = 0;

    for (;;) {
        uint64_t now = now_ms();

        /* or when the clock has gone back */
        if (now >= next || next - now > BEAT_MS) {
            beat(++number);
            report_checks();
            next = now + BEAT_MS;
        }
        if (poll(&in, 1, next - now) > 0 && told_to_finish()) {
            return;
        }
        if (waitpid(-1, NULL, WNOHANG) > 0) {
            say("FAIL a worker ended early");
            exit(2);
        }
    }
}

/* Blocking writes, but reads that return at once: poll says when. */
static void open_channel(const char *path)
{
    struct termios tio;

    channel = open(path, O_RDWR | O_NOCTTY);
    if (channel < 0 || tcgetattr(channel, &tio)) {
        exit(3);
    }
    cfmakeraw(&tio);
    tio.c_cc[VMIN] = 0;
    tio.c_cc[VTIME] = 0;
    if (tcsetattr(channel, TCSANOW, &tio)) {
        exit(3);
    }
}

static void fork_worker(struct region *r, const char *database)
{
    pid_t pid = fork();

    if (pid < 0) {
        die("fork");
    }
    if (pid == 0) {
        if (r) {
            block_work(r);
        } else {
            sql_work(database);
        }
        exit(0);
    }
}

static int collect(void)
{
    int status, bad = 0;

    while (wait(&status) > 0) {
        bad |= !WIFEXITED(status) || WEXITSTATUS(status);
    }
    for (int i = 0; i < shared->regions; i++) {
        struct region *r = &shared->region[i];

        say("REGION dev=%s first=%llu blocks=%u wrong=%llu digest=%08x",
            r->device, (unsigned long long)r->first, r->blocks,
            (unsigned long long)atomic_load(&r->wrong), r->digest);
    }
    return bad;
}

int main(int argc, char **argv)
{
    if (argc < 4 || argc - 3 > MAX_REGIONS) {
        fprintf(stderr, "usage: worker CHANNEL DATABASE "
                "DEVICE:FIRST:BLOCKS:BUSY...\n");
        return 2;
    }
    open_channel(argv[1]);
    shared = mmap(NULL, sizeof(*shared), PROT_READ | PROT_WRITE,
                  MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (shared == MAP_FAILED) {
        die("mmap");
    }
    shared->regions = argc - 3;
    for (int i = 0; i < shared->regions; i++) {
        parse_region(argv[3 + i], &shared->region[i]);
    }

    for (int i = 0; i < shared->regions; i++) {
        fork_worker(&shared->region[i], NULL);
    }
    fork_worker(NULL, argv[2]);
    beat_until_finish();
    atomic_store(&shared->stop, true);
    return collect();
}
