/**
 * The protocol of a step, for a node without children: what comes from the parent goes in, what the parent gets comes
 * out. It decides and does nothing else: no socket, no timer, no thread. Rules N1 to N22 are those of docs/protocol.md.
 *
 * | from outside                | here                                                                  |
 * |-----------------------------|-----------------------------------------------------------------------|
 * | a WorkResponse              | `onResponse`; throws LinkError where the link must end                |
 * | the link may take a message | `nextUp` gives one, or null                                           |
 * | the thread is free          | `nextUnit` gives a block to compute, or null; its end is `computed`   |
 * | another link                | `hello` for it, and `relinked` once there was a welcome               |
 */
import { chunkRange } from './config.js';
import { LinkError, ProtocolError } from './errors.js';
import { addRounded, addSums, contains, crc32c, decompose, halves, indicesOf, isCanonical, toWire } from './wire.js';
import { Weights } from './weights.js';

/** @typedef {import('./wire.js').Block} Block */
/** @typedef {import('./compute.js').Held} Held */
/** @typedef {import('./compute.js').Unit} Unit */

export const PROTOCOL_VERSION = 1;
/** Verdicts of one header that say more than which microbatch it is: so a header of 4,096 stays far below the limit. */
const MOST_DETAILED = 32;
/** Seconds for which a worker whose task has failed computes nothing, doubled each time up to the longest. */
const ASIDE_SECONDS = 2,
    LONGEST_ASIDE = 64;

const KINDS = /** @type {Record<string, number>} */ ({ WORK_KIND_EVALUATE: 1, WORK_KIND_TRAIN: 2 });
const key = (/** @type {Block} */ { lo, hi }) => `${lo}-${hi}`;
const text = (/** @type {Block} */ { lo, hi }) => `[${lo},${hi})`;

/** Work is ordered by (term, step, kind). @param {number[]} left @param {number[]} right */
const compare = (left, right) => left.map((value, i) => value - right[i]).find((difference) => difference) ?? 0;

/** Mutable state: the work in hand, what is owed of it and what is held; the weights; what waits to go up. */
export class Leaf {
    /** (term, step, kind) of the work in hand, and its tag as it is sent */
    work = [0, -1, 0];
    /** @type {any} */
    tag;
    session = 0;
    /** the attempt, its first chunk, and whether it has been assigned; below, of attempt 0 at the start of a step */
    attempt = 0;
    fromChunk = 0;
    assigned = false;
    /** the last chunk that may be sent (N6) */
    allowed = -1;
    /** what is owed, and the next chunk of each block @type {{block: Block, next: number}[]} */
    owed = [];
    /** blocks that what is owed consists of, held ones as they are @type {Map<string, Block>} */
    parts = new Map();
    /** of `parts`, what is still to be computed @type {Block[]} */
    queue = [];
    /** computed blocks of the work in hand, kept until the next header @type {Map<string, Held>} */
    cache = new Map();
    /** the block in compute @type {Unit | null} */
    unit = null;
    units = 0;
    /** messages that belong to no chunk @type {any[]} */
    up = [];
    leaving = '';
    /** what is said of the task's latest failure until its step is over, how often it failed, and until when it rests
     * @type {any} */
    failure = null;
    failures = 0;
    asideUntil = 0;
    counts = { microbatches: 0, samples: 0, upBytes: 0, stale: 0 };
    /** seconds per phase, of the work in hand and in all */
    phases = /** @type {Record<string, number>} */ ({});
    allPhases = /** @type {Record<string, number>} */ ({});

    /** @param {import('./config.js').Config} config @param {{id: string, incarnation: string}} who
     * @param {() => number} clock seconds, monotonic */
    constructor(config, { id, incarnation }, clock) {
        this.config = config;
        this.id = id;
        this.incarnation = incarnation;
        this.clock = clock;
        this.weights = new Weights(config);
        this.tag = { run_id: config.runId };
        this.began = this.arriving = clock();
    }

    // ---- what is so now

    get train() {
        return this.work[2] === KINDS.WORK_KIND_TRAIN;
    }

    /** Units per block that go up: the chunks, or the one message of an evaluation. */
    get chunks() {
        return this.train ? this.config.chunkCount : 1;
    }

    get total() {
        return this.train ? this.config.microbatches : this.config.evaluationMicrobatches;
    }

    get computes() {
        return this.clock() >= this.asideUntil;
    }

    /** Everything owed has been sent. */
    get finished() {
        return this.assigned && this.owed.every(({ next }) => next >= this.chunks);
    }

    /** Whether nobody needs this worker: it owes nothing of the work in hand, and holds nothing of it (N7). */
    get mayLeave() {
        return !this.owed.length && !this.cache.size && !this.unit;
    }

    get activity() {
        if (this.unit) return `computing ${text(this.unit.block)} of step ${this.work[1]}`;
        if (!this.computes) return `set aside for ${Math.ceil(this.asideUntil - this.clock())} s: its task has failed`;
        if (!this.weights.complete) return 'receiving weights';
        return this.finished ? 'done' : `at step ${this.work[1]}`;
    }

    /** Blocks, merged to maximal canonical ones. @param {Iterable<Block>} blocks */
    #merged(blocks) {
        return this.total ? decompose(indicesOf(blocks), { lo: 0, hi: this.total }) : [];
    }

    #held() {
        return [...this.cache.values()].map(({ block }) => block);
    }

    // ---- links

    /** The first message of a link. @param {{id: string, incarnation: string}} parent @param {any} rest who this is */
    hello(parent, rest) {
        const { weights, config } = this;
        const held = this.unit ? [...this.#held(), this.unit.block] : this.#held();
        const hello = {
            protocol_version: PROTOCOL_VERSION,
            sphere_id: this.id,
            incarnation: this.incarnation,
            parent_id: parent.id,
            parent_incarnation: parent.incarnation,
            task_fingerprint: config.taskFingerprint,
            data_fingerprint: config.dataFingerprint,
            holds_weights: weights.complete,
            weights_version: Math.max(0, weights.version),
            weights_digest: weights.digest,
            weights_chunks_held: weights.resumable,
            weights_term: weights.term,
            held: this.#merged(held),
            capacity: this.computes ? 1 : 0,
            leaving: this.leaving !== '',
            ...rest,
        };
        this.session++;
        return { tag: this.tag, session: this.session, hello };
    }

    /** A parent took this worker in: what was owed to the one before is void, what was computed stays. */
    relinked() {
        this.#void(0, 0);
        this.up = this.up.filter((message) => !message.ready);
        if (this.failure) this.up.push({ task_failure: this.failure }); // the link before may have died with it
    }

    /** Say that this worker goes: nothing new is given to it. @param {string} reason */
    leave(reason) {
        this.leaving = reason;
        this.up.push({ leaving: { reason } });
    }

    /** It has rested after a failure: it computes again. */
    rested() {
        if (!this.computes) return;
        this.failure = null;
        this.up.push({ capacity: { capacity: 1 } });
    }

    // ---- what came down

    /** Take a message that is neither a directive nor a welcome, which have no tag of a step. @param {any} message */
    onResponse(message) {
        const { tag } = message,
            header = message.weights_header;
        if (tag?.run_id !== this.config.runId) throw new ProtocolError(`a message of run '${tag?.run_id}'`);
        const work = [Number(tag.term), Number(tag.step), KINDS[tag.kind] ?? 0],
            order = compare(work, this.work);
        if (order < 0) return void this.counts.stale++; // also what a parent sends that is behind (N14)
        if (order > 0 && !header) throw new ProtocolError(`a message of step ${tag.step} came before its header`);
        if (header) this.#onHeader(work, tag, header, message.assign);
        if (message.begin) this.#onBegin(message.begin);
        if (message.assign && !header) this.#onAssign(message.assign);
        if (message.weights_chunk) this.weights.put(message.weights_chunk);
        if (message.weights_reference) throw new ProtocolError('weights by reference; this worker shares no memory');
        if (message.weights_footer) {
            this.weights.finish(message.weights_footer.digest);
            this.#spend('send_down', this.clock() - this.arriving);
        }
        if (message.credit) this.#onCredit(message.credit);
    }

    /** @param {number[]} work @param {any} tag @param {any} header @param {any} assign */
    #onHeader(work, tag, header, assign) {
        if (!work[2]) throw new ProtocolError(`work of kind ${tag.kind} is not known here`);
        this.weights.begin(header, { term: work[0], version: Number(tag.weights_version) });
        if (!header.held_digest.length && !header.from_chunk) this.arriving = this.clock();
        this.tag = tag;
        if (compare(work, this.work) > 0) {
            // the step before is sealed (N14): what still computes ends in a buffer that nobody reads
            this.work = work;
            this.cache.clear();
            this.unit = this.failure = null;
            this.up = this.up.filter((message) => !message.ready);
            this.phases = {};
            this.began = this.clock();
            this.#void(0, 0);
        }
        if (assign) {
            this.#void(0, 0); // with a header it is attempt 0's, also where the step is the same
            this.#take(assign);
        }
    }

    /** A new attempt (N4): drop what was owed, keep what is computed or in compute, say what there is.
     * @param {{attempt: number, from_chunk: number}} begin */
    #onBegin({ attempt, from_chunk: fromChunk }) {
        if (attempt <= this.attempt) return void this.counts.stale++;
        if (fromChunk < 0 || fromChunk > this.chunks)
            throw new ProtocolError(`begin from chunk ${fromChunk} of ${this.chunks}`);
        this.#void(attempt, fromChunk);
        const ready = {
            held: this.#merged(this.#held()),
            computing: this.unit ? [this.unit.block] : [],
            idle: this.computes && !this.unit,
        };
        this.up = [...this.up.filter((message) => !message.ready), { attempt, ready }];
    }

    /** @param {any} assign */
    #onAssign(assign) {
        // one of another attempt has crossed a newer begin
        if (assign.attempt === 0 || assign.attempt !== this.attempt || this.assigned) return void this.counts.stale++;
        this.#take(assign);
    }

    /** @param {{attempt: number, through_chunk: number}} credit */
    #onCredit({ attempt, through_chunk: through }) {
        if (attempt !== this.attempt || !this.assigned) return void this.counts.stale++;
        this.allowed = Math.max(this.allowed, through);
    }

    /** Nothing is owed. @param {number} attempt @param {number} fromChunk */
    #void(attempt, fromChunk) {
        Object.assign(this, {
            attempt,
            fromChunk,
            assigned: false,
            allowed: -1,
            owed: [],
            parts: new Map(),
            queue: [],
        });
    }

    /** These blocks are owed, and nothing else: held ones as they are, the largest first (N9), the rest is computed.
     * @param {{blocks: Block[], from_chunk: number}} assign */
    #take({ blocks, from_chunk: fromChunk }) {
        const owed = blocks.map(({ lo, hi }) => ({ lo, hi })).sort((a, b) => a.lo - b.lo);
        owed.forEach((block, i) => {
            if (!isCanonical(block, this.total))
                throw new ProtocolError(`${text(block)} is no canonical block of ${this.total}`);
            if (i && owed[i - 1].hi > block.lo) throw new ProtocolError(`assigned blocks overlap at ${text(block)}`);
        });
        if (fromChunk < this.fromChunk || fromChunk > this.chunks)
            throw new ProtocolError(`assignment from chunk ${fromChunk}`);
        this.fromChunk = fromChunk;
        this.assigned = true;
        this.allowed = fromChunk + this.config.window - 1;
        this.owed = owed.map((block) => ({ block, next: fromChunk }));
        const rest = fromChunk < this.chunks ? indicesOf(owed) : new Set();
        const offers = this.unit ? [...this.#held(), this.unit.block] : this.#held();
        const usable = offers.filter((offer) => owed.some((block) => contains(block, offer)));
        for (const offer of usable.sort((a, b) => b.hi - b.lo - (a.hi - a.lo))) {
            const indices = indicesOf([offer]);
            if (![...indices].every((index) => rest.has(index))) continue;
            indices.forEach((index) => rest.delete(index));
            this.parts.set(key(offer), offer);
        }
        this.queue = owed.flatMap((block) => decompose(rest, block));
        if (this.queue.length && !this.computes)
            throw new LinkError('its task has just failed: others must compute this');
        for (const block of this.queue) this.parts.set(key(block), block);
    }

    // ---- computing

    /** The next block to compute, once the weights are whole. @returns {Unit | null} */
    nextUnit() {
        if (this.unit || !this.weights.complete || !this.queue.length || !this.computes) return null;
        const block = /** @type {Block} */ (this.queue.shift());
        this.unit = { number: ++this.units, block, step: this.work[1], train: this.train };
        return this.unit;
    }

    /** The thread has finished a unit. Throws LinkError where the task failed and something is still owed.
     * @param {import('./compute.js').Result} result @returns {number} seconds to rest, where it failed; else 0 */
    computed({ unit, held, failure, ...spent }) {
        if (unit.number !== this.unit?.number) return 0; // its step is over
        this.unit = null;
        this.#spend('compute', spent.seconds);
        this.counts.microbatches += spent.microbatches;
        this.counts.samples += spent.samples;
        if (held) {
            this.cache.set(key(held.block), held);
            return 0;
        }
        // An exception is no death: what is owed is computed once more elsewhere, and this worker rests for a while.
        const seconds = Math.min(ASIDE_SECONDS * 2 ** this.failures++, LONGEST_ASIDE);
        this.asideUntil = this.clock() + seconds;
        this.failure = { ...failure, sphere_id: this.id, step: unit.step, failures_count: this.failures };
        this.up.push({ task_failure: this.failure }, { capacity: { capacity: 0 } });
        this.queue = [];
        return seconds;
    }

    /** Whether something is owed that is neither held nor in compute, while nothing is computed: the link must end. */
    get stuck() {
        return !this.computes && [...this.parts.keys()].some((part) => !this.cache.has(part));
    }

    // ---- what goes up

    /** The next message for the parent, or null where nothing can be sent now: it counts as sent. */
    nextUp() {
        if (this.up.length) return { tag: this.tag, session: this.session, ...this.up.shift() };
        // While they arrive again, on a new link, there is no digest to send along; what was computed stays good.
        if (!this.weights.complete) return null;
        // chunk by chunk across all blocks, so that every block's sum can be passed on (N6)
        const due = this.owed
            .filter(({ next }) => next < this.chunks)
            .sort((a, b) => a.next - b.next || a.block.lo - b.block.lo);
        for (const debt of due) {
            const held = this.#collect(debt.block);
            if (held && (!held.sums || debt.next <= this.allowed)) return this.#frame(debt, held, due.length === 1);
        }
        return null;
    }

    /** A frame has left, in so many seconds. @param {number} seconds */
    wentUp(seconds) {
        this.#spend('send_up', seconds);
    }

    /** What is known of a block as the sum of its parts, null while one is missing.
     * @param {Block} block @returns {{leaves: Held[], sums: import('./wire.js').Sums | null} | null} */
    #collect(block) {
        if (this.parts.has(key(block))) {
            const held = this.cache.get(key(block));
            return held ? { leaves: [held], sums: held.sums } : null;
        }
        if (block.hi - block.lo === 1) return null;
        const [left, right] = halves(block).map((half) => this.#collect(half));
        return left && right && { leaves: [...left.leaves, ...right.leaves], sums: addSums(left.sums, right.sums) };
    }

    /** Elements [first, end) of a block, its parts added as the tree says; null where it is absent.
     * @param {Block} block @param {[number, number]} range @returns {Float32Array | null} */
    #slice(block, range) {
        if (this.parts.has(key(block))) return this.cache.get(key(block))?.array?.subarray(...range) ?? null;
        const [left, right] = halves(block).map((half) => this.#slice(half, range));
        if (!left || !right) return left ?? right;
        const sum = new Float32Array(left.length);
        addRounded(left, right, sum, this.config.gradientDtype);
        return sum;
    }

    /** @param {{block: Block, next: number}} debt @param {{leaves: Held[], sums: import('./wire.js').Sums | null}} held
     * @param {boolean} lastBlock of the assignment */
    #frame(debt, { leaves, sums }, lastBlock) {
        const { block, next: index } = debt,
            absent = !sums;
        /** @type {any} */
        const frame = { tag: this.tag, session: this.session, attempt: this.attempt };
        if (index === this.fromChunk || absent) {
            frame.gradient_header = {
                block,
                weights_digest: this.weights.digest,
                absent,
                samples_count: sums?.count ?? 0,
                loss_sum: sums?.loss ?? 0,
                metrics: Object.entries(sums?.metrics ?? {})
                    .sort()
                    .map(([name, value]) => ({ name, value })),
                skipped: leaves
                    .flatMap((leaf) => leaf.skipped)
                    .map((verdict, number) =>
                        number < MOST_DETAILED
                            ? { ...verdict, sphere_id: this.id }
                            : { microbatch: verdict.microbatch },
                    ),
            };
        }
        if (!absent) {
            const range = chunkRange(this.config, index),
                array = this.train ? this.#slice(block, range) : null;
            const data = array ? toWire(array, this.config.gradientDtype) : Buffer.alloc(0);
            frame.gradient_chunk = { block, index, offset_bytes: 4 * range[0], crc32c: crc32c(data), data };
            this.counts.upBytes += data.length;
        }
        debt.next = absent ? this.chunks : index + 1;
        if (debt.next === this.chunks) {
            const contributions = leaves.map((leaf) => ({
                block: leaf.block,
                sphere_id: this.id,
                crc32c: leaf.crc32c,
            }));
            frame.gradient_footer = { block, contributions, phases: lastBlock ? this.#times() : [] };
        }
        return frame;
    }

    /** What was spent on nothing else was spent waiting. */
    #times() {
        const { wait = 0, ...busy } = this.phases;
        const rest = this.clock() - this.began - Object.values(busy).reduce((a, b) => a + b, 0);
        this.#spend('wait', Math.max(0, rest) - wait);
        return Object.entries(this.phases).map(([phase, seconds]) => ({
            phase,
            sum_seconds: seconds,
            max_seconds: seconds,
            slowest_sphere_id: this.id,
        }));
    }

    /** @param {string} phase @param {number} seconds */
    #spend(phase, seconds) {
        for (const times of [this.phases, this.allPhases]) times[phase] = (times[phase] ?? 0) + seconds;
    }
}
