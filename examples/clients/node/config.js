/** What a worker must know of the run, from the answer to EnrollSphere. Plain data: it goes to the thread, too. */
import { RefusedError, TaskError } from './errors.js';
import { flatSize, manifestDigest } from './wire.js';

const DTYPES = /** @type {Record<string, import('./wire.js').Dtype>} */ ({
    WIRE_DTYPE_UNSPECIFIED: 'float32',
    WIRE_DTYPE_FLOAT32: 'float32',
    WIRE_DTYPE_BFLOAT16: 'bfloat16',
});

/** @typedef {ReturnType<typeof readConfig>} Config */

const milliseconds = (/** @type {{seconds: string, nanos: number} | null} */ d) =>
    d ? Number(d.seconds) * 1e3 + d.nanos / 1e6 : 0;

/** @param {any} message a SphereConfiguration */
export function readConfig(message) {
    const { tensors, digest } = message.manifest ?? { tensors: [], digest: Buffer.alloc(0) };
    if (!tensors.length || !manifestDigest(tensors).equals(digest)) {
        throw new RefusedError('the manifest does not fit its digest: is this worker of the same release as control?');
    }
    if (message.wire === 'WIRE_SHM') {
        throw new RefusedError(
            'the run was started with --wire shm, and this worker shares no memory; start it with --wire auto',
        );
    }
    if (message.task !== 'digits')
        throw new TaskError(`the run trains task '${message.task}'; this worker knows digits only`);
    const [gradientDtype, weightsDtype] = [DTYPES[message.gradient_dtype], DTYPES[message.weights_dtype]];
    if (!gradientDtype || !weightsDtype)
        throw new RefusedError('a type on the wire is not known here; take a newer worker');
    // no more than chunk_bytes hold in the wider of the two types (N2)
    const chunkElements = message.chunk_bytes / (gradientDtype === 'bfloat16' && weightsDtype === 'bfloat16' ? 2 : 4);
    const size = flatSize(tensors);
    return {
        runId: /** @type {string} */ (message.run_id),
        taskOptions: /** @type {Record<string, string>} */ (message.task_options),
        seed: BigInt(message.seed),
        batchSize: /** @type {number} */ (message.batch_size),
        microbatches: /** @type {number} */ (message.microbatches_count),
        evaluationMicrobatches: /** @type {number} */ (message.evaluation_microbatches_count),
        trainSize: Number(message.train_size),
        testSize: Number(message.test_size),
        tensors: /** @type {{name: string, shape: number[], offset: number, dtype: string}[]} */ (
            tensors.map((/** @type {any} */ t) => ({ ...t, offset: Number(t.offset), shape: t.shape.map(Number) }))
        ),
        manifestDigest: /** @type {Buffer} */ (digest),
        /** elements of the flat buffer, of a chunk, and how many chunks there are */
        size,
        chunkElements,
        chunkCount: Math.ceil(size / chunkElements),
        window: /** @type {number} */ (message.window_chunks),
        skipsNonfinite: /** @type {boolean} */ (message.skips_nonfinite),
        gradientDtype,
        weightsDtype,
        heartbeatMs: milliseconds(message.heartbeat_interval),
        patienceMs: milliseconds(message.patience),
        taskFingerprint: /** @type {string} */ (message.task_fingerprint),
        dataFingerprint: /** @type {string} */ (message.data_fingerprint),
    };
}

/** Elements [first, end) of a chunk; the last one of all may be short (N2).
 * @param {Config} config @param {number} index */
export const chunkRange = (config, index) =>
    /** @type {[number, number]} */ ([
        index * config.chunkElements,
        Math.min((index + 1) * config.chunkElements, config.size),
    ]);
