#!/usr/bin/env node
/**
 * A worker for an Armillary tree: its command line and its life. README.md says what is where.
 *
 * The life of one worker: enroll, check the configuration, load the task, then a link after another until the run is
 * over. The leaf decides, the parent's link carries, the thread computes; this file only connects them.
 */
import { createHash, randomUUID } from 'node:crypto';
import { hostname } from 'node:os';
import { setTimeout as sleep } from 'node:timers/promises';
import { fileURLToPath } from 'node:url';
import { parseArgs } from 'node:util';
import { ComputeThread } from './compute.js';
import { readConfig } from './config.js';
import { Digits } from './digits.js';
import { LinkError, RefusedError, StaleError, TaskError, UsageError, WorkerError } from './errors.js';
import { Leaf, PROTOCOL_VERSION } from './leaf.js';
import { enroll } from './link.js';
import { Parent } from './parent.js';
import { checkVectors } from './vectors.js';

const VERSION = '0.1.0';
const DATA = fileURLToPath(new URL('../../../spheres/tasks/data/digits.csv.gz', import.meta.url));
const USAGE = `usage: worker.js --control HOST:PORT [--data FILE] [--orphan-timeout 60s]
       worker.js --vectors DIR

  --control HOST:PORT    address of control (or ARMILLARY_CONTROL)
  --data FILE            digits.csv.gz (that of the source tree)
  --orphan-timeout TIME  end after so long without control (60s)
  --vectors DIR          check this worker against protos/testdata, and end

exit codes: 0 the run is over, or told to go; 1 any other error; 2 wrong flags; 3 the task or its data cannot be loaded;
5 control or the run refused, or nobody answered for --orphan-timeout; 130 Ctrl+C. SIGTERM lets the step finish.`;

/** Gradients have equal bits among equal ones: the engine's arithmetic, and this worker's order of sums. */
const ENVIRONMENT = createHash('sha256')
    .update(`node ${process.version}\nv8 ${process.versions.v8}\narch ${process.arch}\nworker ${VERSION}`)
    .digest('hex')
    .slice(0, 16);
const AGENT = `node ${process.versions.node.split('.').slice(0, 2).join('.')}`;

/** Seconds that control has to answer a request to enroll. */
const ANSWER_SECONDS = 10;

/** Lines of the log that are kept for `control-cli logs`, and bytes of an answer with them. */
const MOST_LINES = 1_000,
    MOST_BYTES = 256 * 1024;
const lines = /** @type {string[]} */ ([]);

/** @param {string} text */
function log(text) {
    const line = `${new Date().toISOString()} ${text}`;
    lines.push(line);
    if (lines.length > MOST_LINES) lines.shift();
    process.stderr.write(`${line}\n`);
}

/** @param {number} count */
function lastLines(count) {
    let room = MOST_BYTES;
    const wanted = lines.slice(-Math.min(count, MOST_LINES)).reverse();
    const end = wanted.findIndex((line) => (room -= Buffer.byteLength(line) + 4) < 0);
    return (end < 0 ? wanted : wanted.slice(0, end)).reverse();
}

/** @typedef {{control: string, data: string, orphanMs: number}} Options */
/** Told once, for good: to end now, and before that, perhaps, to leave in order. */
class Orders {
    /** @type {(value: 'told') => void} */
    stop = () => {};
    told = /** @type {Promise<'told'>} */ (new Promise((resolve) => (this.stop = resolve)));
}

/** Who this is, for control and for people. */
const SELF = { host: hostname(), zone: process.env.ARMILLARY_ZONE ?? '', pid: process.pid, agent: AGENT };

/** Ask control for a place, patiently: it may be about to start. Null where this worker was told to end.
 * @param {Options} options @param {Orders} orders */
async function enrolled({ control, orphanMs }, { told }) {
    const deadline = performance.now() + orphanMs,
        seconds = orphanMs / 1000;
    const request = { ...SELF, protocol_version: PROTOCOL_VERSION, request_id: randomUUID() };
    log(`looking for control at ${control}, for up to ${seconds} s`);
    for (let pause = 50; ; pause = Math.min(2 * pause, 2_000)) {
        const left = (deadline - performance.now()) / 1000;
        try {
            const answer = enroll(control, request, Math.min(ANSWER_SECONDS, Math.max(1, left)));
            const granted = await Promise.race([answer, told]);
            return granted === 'told' ? null : granted;
        } catch (error) {
            const { name, message } = /** @type {LinkError} */ (error);
            if (!['UnreachableError', 'LinkClosedError'].includes(name)) {
                throw new RefusedError(`control at ${control} refused: ${message}`);
            }
            if (performance.now() + pause > deadline) {
                const advice = 'is it running, and is the address right?';
                throw new RefusedError(`control at ${control} does not answer (tried for ${seconds} s); ${advice}`);
            }
        }
        if ((await Promise.race([sleep(pause), told])) === 'told') return null;
    }
}

/** One incarnation: the leaf, its thread and its parent, connected. */
class Incarnation {
    #draining = false;

    /** @param {any} granted what control answered @param {Options} options @param {Orders} orders */
    constructor(granted, { control, data, orphanMs }, orders) {
        const config = readConfig(granted.configuration),
            task = new Digits(data, config.taskOptions, config.tensors);
        if (task.size('train') !== config.trainSize || task.fingerprint !== config.dataFingerprint) {
            throw new TaskError(`${data} is not what control trains on; copy the same data here`);
        }
        const who = { id: granted.sphere_id, incarnation: granted.incarnation };
        const leaf = (this.leaf = new Leaf(config, who, () => performance.now() / 1000));
        this.orders = orders;
        this.broken = new Promise((_, reject) => {
            this.thread = new ComputeThread(
                config,
                data,
                leaf.weights.flat,
                (result) => this.#computed(result),
                reject,
            );
        });
        const { path_ids: ids, path_addresses: addresses, path_incarnations: incarnations } = granted;
        const ancestors = ids.map((/** @type {string} */ id, /** @type {number} */ i) => ({
            id,
            address: addresses[i],
            incarnation: incarnations[i],
        }));
        ancestors[0].address = control; // it works from here, whatever control believes of its own
        this.parent = new Parent(leaf, ancestors, {
            hello: { environment_fingerprint: ENVIRONMENT, member: { ...SELF, environment_fingerprint: ENVIRONMENT } },
            report: () => this.#report(),
            directed: (directive) => this.#directed(directive),
            changed: () => this.#compute(),
            orphanMs,
            log,
        });
        log(`${leaf.id} joins ${this.parent.id} (incarnation ${leaf.incarnation})`);
    }

    /** Take part until told to end. Throws what makes that impossible; StaleError where another has this id now. */
    async live() {
        try {
            await Promise.race([this.parent.run(), this.broken, this.orders.told]);
        } finally {
            await this.parent.close();
            await this.thread?.close();
        }
    }

    /** Give the thread what is to be computed next, or take from it what is of the past. */
    #compute() {
        const unit = this.leaf.nextUnit();
        if (unit) this.thread?.submit(unit);
        else if (!this.leaf.unit) this.thread?.cancel();
    }

    /** @param {import('./compute.js').Result | null} result */
    #computed(result) {
        if (!result) return;
        const rest = this.leaf.computed(result);
        if (rest) {
            log(`the task failed: ${result.failure?.error}; computing nothing for ${rest} s`);
            setTimeout(
                () => {
                    this.leaf.rested();
                    void this.parent.wake();
                },
                1000 * rest + 1,
            );
            const reason = new LinkError('its task has failed: others must compute what it owes');
            if (this.leaf.stuck) this.parent.link?.end(reason);
        }
        this.#compute();
        void this.parent.wake();
    }

    /** From control to this worker. @param {any} directive */
    #directed({ kind, reason, parent, request_id, lines: count }) {
        if (kind === 'DIRECTIVE_KIND_STOP') {
            log(`told to stop: ${reason}`);
            this.orders.stop('told');
        } else if (kind === 'DIRECTIVE_KIND_DRAIN') {
            void this.drain(reason || 'a directive');
        } else if (kind === 'DIRECTIVE_KIND_MOVE') {
            this.parent.move(parent);
        } else if (kind === 'DIRECTIVE_KIND_REPORT_STATE') {
            this.leaf.up.push({ state_report: { request_id, report: this.#report() } });
        } else if (kind === 'DIRECTIVE_KIND_REPORT_LOG') {
            this.leaf.up.push({ log_report: { request_id, sphere_id: this.leaf.id, lines: lastLines(count) } });
        } else {
            log(`directive ${kind} is not known here`);
        }
    }

    /** Say that this worker goes, wait until nobody needs it, end. A second call changes nothing.
     * @param {string} reason */
    async drain(reason) {
        if (this.#draining) return;
        this.#draining = true;
        const { leaf, parent } = this,
            patience = leaf.config.patienceMs;
        log(`${leaf.id} leaves: ${reason}`);
        leaf.leave(reason);
        void parent.wake();
        // between two steps no header comes: then, after a while, it goes, and what it held can be computed again
        let until = performance.now() + patience;
        while (parent.link && !leaf.mayLeave && performance.now() < until) {
            await sleep(50);
            if (leaf.assigned && !leaf.finished) until = performance.now() + patience;
        }
        this.orders.stop('told');
    }

    /** What this worker says of itself. */
    #report() {
        const { leaf, parent } = this,
            { counts, weights } = leaf;
        return {
            sphere_id: leaf.id,
            incarnation: leaf.incarnation,
            parent_id: parent.id,
            role: 'leaf',
            host: SELF.host,
            pid: SELF.pid,
            wire: 'inline',
            activity: leaf.activity,
            weights_version: Math.max(0, weights.version),
            weights_digest: weights.digest,
            microbatches_count: counts.microbatches,
            samples_count: counts.samples,
            sent_up_bytes: counts.upBytes,
            phase_seconds: leaf.allPhases,
            refused_counts: counts.stale ? { stale: counts.stale } : {},
            resident_bytes: process.memoryUsage.rss(),
            peak_resident_bytes: process.resourceUsage().maxRSS * 1024,
        };
    }
}

/** @param {string} text such as 60s, 5m or 500ms */
function durationMs(text) {
    const [, number, unit] = /^(\d+(?:\.\d+)?)(ms|s|m|h)?$/.exec(text) ?? [];
    if (number === undefined) throw new UsageError(`--orphan-timeout ${text}: give a duration such as 60s, 5m or 0.5s`);
    const units = /** @type {Record<string, number>} */ ({ ms: 1, s: 1_000, m: 60_000, h: 3_600_000 });
    return Number(number) * units[unit ?? 's'];
}

function readFlags() {
    try {
        return parseArgs({
            options: {
                control: { type: 'string' },
                data: { type: 'string' },
                'orphan-timeout': { type: 'string' },
                vectors: { type: 'string' },
                help: { type: 'boolean' },
            },
        }).values;
    } catch (error) {
        throw new UsageError(`${/** @type {Error} */ (error).message.split('. ')[0]}; see worker.js --help`);
    }
}

/** @returns {Promise<number>} the exit code */
async function main() {
    const flags = readFlags();
    if (flags.help) {
        process.stdout.write(`${USAGE}\n`);
        return 0;
    }
    if (flags.vectors !== undefined) return checkVectors(flags.vectors) ? 0 : 1;
    const control = flags.control ?? process.env.ARMILLARY_CONTROL;
    if (!control) throw new UsageError('--control HOST:PORT is missing; see worker.js --help');
    if (!/^.+:\d{1,5}$/.test(control)) {
        throw new UsageError(`--control ${control} is no address; give HOST:PORT, such as 127.0.0.1:5000`);
    }
    const options = { control, data: flags.data ?? DATA, orphanMs: durationMs(flags['orphan-timeout'] ?? '60s') };
    const orders = new Orders();
    /** @type {Incarnation | undefined} */
    let present;
    let signals = 0;
    for (const [signal, number] of /** @type {[NodeJS.Signals, number][]} */ ([
        ['SIGTERM', 15],
        ['SIGINT', 2],
    ])) {
        process.on(signal, () => {
            if (signals++) process.exit(128 + number);
            if (present) void present.drain(`${signal}; once more to end at once`);
            else orders.stop('told');
        });
    }
    for (let granted; (granted = await enrolled(options, orders));) {
        present = new Incarnation(granted, options, orders);
        try {
            await present.live();
            break;
        } catch (error) {
            if (!(error instanceof StaleError)) throw error;
            log(`enrolling anew: ${error.message}`);
        }
    }
    return 0;
}

try {
    process.exit(await main());
} catch (error) {
    const known = error instanceof WorkerError;
    const text = known ? error.message.replace(/\s+/g, ' ') : String(/** @type {Error} */ (error).stack);
    process.stderr.write(`error: ${text}\n`);
    process.exit(known ? error.exitCode : 1);
}
