/*
 * What faces fio: its structures are read and written here only, through the headers of the very version that loads this
 * (FIO_SRC). Everything else is Rust, behind the functions declared below.
 *
 * Three checks stand against a fio that was built otherwise: fio itself compares FIO_IOOPS_VERSION; cryptfold_setup compares
 * the version's text, and two pointers deep in struct thread_data whose values are known.
 */
#include <errno.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "fio.h"
#include "optgroup.h"

struct cryptfold_options {
	/* fio takes an offset of 0 for "no offset". */
	void *unused;
	char *traddr;
	char *trsvcid;
	char *subnqn;
	char *hostnqn;
	char *psk;
	char *dhchap_key;
	unsigned int nsid;
	unsigned int psk_version;
	unsigned int hdgst;
	unsigned int ddgst;
	unsigned int ktls;
	unsigned int io_timeout;
};

/* In Rust (ffi.rs), with the same layout. */
struct cryptfold_target {
	const char *traddr, *trsvcid, *subnqn, *hostnqn, *psk, *dhchap_key;
	uint32_t nsid, psk_version, hdgst, ddgst, ktls, io_timeout, depth;
};
struct cryptfold_event {
	void *tag;
	int32_t error;
};
enum { OP_READ, OP_WRITE, OP_TRIM, OP_FLUSH };
void *cryptfold_fio_open(const struct cryptfold_target *, uint64_t *bytes, uint32_t *block_bytes, char *why, size_t why_bytes);
void *cryptfold_fio_memory(void *, uint64_t bytes);
int32_t cryptfold_fio_submit(void *, uint32_t op, uint64_t offset, uint64_t bytes, void *data, void *tag);
int32_t cryptfold_fio_wait(void *, uint32_t min, uint32_t max, int64_t timeout_ns);
int32_t cryptfold_fio_event(void *, uint32_t index, struct cryptfold_event *);
void cryptfold_fio_close(void *);

struct ioengine_ops *cryptfold_fio_ops(void);

#define TEXT(field, what) { .name = #field, .lname = #field, .type = FIO_OPT_STR_STORE, .help = what, \
	.off1 = offsetof(struct cryptfold_options, field), .category = FIO_OPT_C_ENGINE, .group = FIO_OPT_G_INVALID }
#define NUMBER(field, first, what) { .name = #field, .lname = #field, .type = FIO_OPT_INT, .def = first, .help = what, \
	.off1 = offsetof(struct cryptfold_options, field), .category = FIO_OPT_C_ENGINE, .group = FIO_OPT_G_INVALID }
#define FLAG(field, what) { .name = #field, .lname = #field, .type = FIO_OPT_BOOL, .def = "0", .help = what, \
	.off1 = offsetof(struct cryptfold_options, field), .category = FIO_OPT_C_ENGINE, .group = FIO_OPT_G_INVALID }

static struct fio_option options[] = {
	TEXT(traddr, "Target's address"),
	TEXT(trsvcid, "Target's port (4420)"),
	TEXT(subnqn, "Subsystem"),
	TEXT(hostnqn, "This host's name (drawn at random)"),
	TEXT(psk, "TLS, by the key in this file (NVMeTLSkey-1:...)"),
	TEXT(dhchap_key, "Authenticate with the secret in this file (DHHC-1:...)"),
	NUMBER(nsid, "1", "Namespace"),
	NUMBER(psk_version, "1", "Version of the TLS identity: 1, or 0 for older targets"),
	NUMBER(io_timeout, "30", "Seconds after which a command that is not answered fails the job"),
	FLAG(hdgst, "Header digests"),
	FLAG(ddgst, "Data digests"),
	FLAG(ktls, "The kernel makes and opens TLS records, where it can"),
	{ .name = NULL },
};

static struct ioengine_ops ops;

static void *connect_it(struct thread_data *td, uint64_t *bytes, uint32_t *block_bytes)
{
	struct cryptfold_options *o = td->eo;
	char why[512] = "";
	struct cryptfold_target target = {
		.traddr = o->traddr, .trsvcid = o->trsvcid, .subnqn = o->subnqn, .hostnqn = o->hostnqn, .psk = o->psk,
		.dhchap_key = o->dhchap_key, .nsid = o->nsid, .psk_version = o->psk_version, .hdgst = o->hdgst,
		.ddgst = o->ddgst, .ktls = o->ktls, .io_timeout = o->io_timeout, .depth = td->o.iodepth,
	};
	void *queue = cryptfold_fio_open(&target, bytes, block_bytes, why, sizeof(why));

	if (!queue)
		log_err("cryptfold: %s\n", why);
	return queue;
}

/* In fio's first process, before it forks: how large the namespace is. Nothing stays open. */
static int cryptfold_setup(struct thread_data *td)
{
	uint64_t bytes;
	uint32_t block_bytes;
	struct fio_file *f;
	unsigned int i;
	void *queue;

	if (strcmp(fio_version_string, FIO_VERSION)) {
		log_err("cryptfold: built for %s, loaded by %s\n", FIO_VERSION, fio_version_string);
		return 1;
	}
	if (td->io_ops != &ops || td->o.magic != OPT_MAGIC || !td->eo) {
		log_err("cryptfold: this fio was configured otherwise than the source in FIO_SRC\n");
		return 1;
	}
	queue = connect_it(td, &bytes, &block_bytes);
	if (!queue)
		return 1;
	cryptfold_fio_close(queue);
	if (td->o.min_bs[DDIR_READ] % block_bytes || td->o.min_bs[DDIR_WRITE] % block_bytes) {
		log_err("cryptfold: bs has to be a multiple of the namespace's blocks of %u bytes\n", block_bytes);
		return 1;
	}
	if (!td->files_index) {
		add_file(td, "cryptfold", 0, 0);
		td->o.nr_files = td->o.nr_files ? td->o.nr_files : 1;
		td->o.open_files++;
	}
	for_each_file(td, f, i) {
		f->filetype = FIO_TYPE_BLOCK;
		f->real_file_size = bytes;
		fio_file_set_size_known(f);
	}
	return 0;
}

static int cryptfold_init(struct thread_data *td)
{
	uint64_t bytes;
	uint32_t block_bytes;

	td->io_ops_data = connect_it(td, &bytes, &block_bytes);
	return !td->io_ops_data;
}

static void cryptfold_cleanup(struct thread_data *td)
{
	if (td->io_ops_data)
		cryptfold_fio_close(td->io_ops_data);
	td->io_ops_data = NULL;
}

/* The queue's close frees it. */
static int cryptfold_iomem_alloc(struct thread_data *td, size_t bytes)
{
	td->orig_buffer = cryptfold_fio_memory(td->io_ops_data, bytes);
	if (!td->orig_buffer)
		log_err("cryptfold: no %zu bytes for %u buffers: less than 4 GiB per job, please\n", bytes, td->o.iodepth);
	return !td->orig_buffer;
}

static enum fio_q_status cryptfold_queue(struct thread_data *td, struct io_u *io_u)
{
	uint32_t op;
	int32_t error;

	fio_ro_check(td, io_u);
	if (io_u->ddir == DDIR_READ)
		op = OP_READ;
	else if (io_u->ddir == DDIR_WRITE)
		op = OP_WRITE;
	else if (io_u->ddir == DDIR_TRIM)
		op = OP_TRIM;
	else if (ddir_sync(io_u->ddir))
		op = OP_FLUSH;
	else {
		io_u->error = EOPNOTSUPP;
		return FIO_Q_COMPLETED;
	}
	error = cryptfold_fio_submit(td->io_ops_data, op, io_u->offset, io_u->xfer_buflen, io_u->xfer_buf, io_u);
	if (error) {
		io_u->error = error;
		return FIO_Q_COMPLETED;
	}
	return FIO_Q_QUEUED;
}

static int cryptfold_getevents(struct thread_data *td, unsigned int min, unsigned int max, const struct timespec *t)
{
	int64_t timeout_ns = t ? (int64_t)t->tv_sec * 1000000000 + t->tv_nsec : -1;

	return cryptfold_fio_wait(td->io_ops_data, min, max, timeout_ns);
}

static struct io_u *cryptfold_event(struct thread_data *td, int index)
{
	struct cryptfold_event event = { NULL, EIO };
	struct io_u *io_u;

	if (cryptfold_fio_event(td->io_ops_data, index, &event))
		return NULL;
	io_u = event.tag;
	io_u->error = event.error;
	io_u->resid = event.error ? io_u->xfer_buflen : 0;
	return io_u;
}

static int cryptfold_nothing(struct thread_data *td, struct fio_file *f)
{
	return 0;
}

static struct ioengine_ops ops = {
	.name = "cryptfold",
	.version = FIO_IOOPS_VERSION,
	/* Offloaded, fio opens a queue in a worker's thread and closes it in another: a queue belongs to one thread (ffi.rs). */
	.flags = FIO_RAWIO | FIO_DISKLESSIO | FIO_NOEXTEND | FIO_NODISKUTIL | FIO_NO_OFFLOAD,
	.setup = cryptfold_setup,
	.init = cryptfold_init,
	.cleanup = cryptfold_cleanup,
	.iomem_alloc = cryptfold_iomem_alloc,
	.queue = cryptfold_queue,
	.getevents = cryptfold_getevents,
	.event = cryptfold_event,
	.open_file = cryptfold_nothing,
	.close_file = cryptfold_nothing,
	.invalidate = cryptfold_nothing,
	.options = options,
	.option_struct_size = sizeof(struct cryptfold_options),
};

struct ioengine_ops *cryptfold_fio_ops(void)
{
	return &ops;
}
