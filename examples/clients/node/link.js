/** gRPC: the services from the protos, one connection per stream, and streams whose end is a promise. */
import { fileURLToPath } from 'node:url';
import grpc from '@grpc/grpc-js';
import protoLoader from '@grpc/proto-loader';
import { LinkError, ProtocolError, fromStatus } from './errors.js';

/** Any message on Work and Heartbeat (docs/protocol.md, Limits). */
const MOST_BYTES = 1_153_433;
/** Seconds that a dialled address has to take the connection. */
const DIAL_SECONDS = 5;
/** Milliseconds that the last words of a link have to leave. */
const LAST_WORDS_MS = 1_000;

const FILES = ['spheres/v1/work.proto', 'spheres/v1/control.proto'];
const PROTOS = fileURLToPath(new URL('../../../protos', import.meta.url));

/** Names as in the protos, 64-bit numbers as text, enums by name. `defaults`: absent fields are null, 0 or "".
 * @param {boolean} defaults */
export const loadProtos = (defaults) =>
    protoLoader.loadSync(FILES, { includeDirs: [PROTOS], keepCase: true, longs: String, enums: String, defaults });

const services = /** @type {any} */ (grpc.loadPackageDefinition(loadProtos(true))).spheres.v1;

const OPTIONS = {
    'grpc.keepalive_time_ms': 10_000,
    'grpc.keepalive_timeout_ms': 30_000,
    'grpc.keepalive_permit_without_calls': 1,
    // a stream shares no connection, and so no flow control, with another
    'grpc.use_local_subchannel_pool': 1,
    'grpc.enable_retries': 0,
};
const LIMITS = { 'grpc.max_receive_message_length': MOST_BYTES, 'grpc.max_send_message_length': MOST_BYTES };

/** Ask control for a place. Throws LinkError with the name of what it answered.
 * @param {string} address @param {any} request @param {number} seconds that it has to answer */
export async function enroll(address, request, seconds) {
    const client = new services.ControlService(address, grpc.credentials.createInsecure(), OPTIONS);
    try {
        return await new Promise((resolve, reject) => {
            const deadline = Date.now() + 1000 * seconds;
            client.EnrollSphere(request, { deadline }, (/** @type {any} */ error, /** @type {any} */ answer) =>
                error ? reject(fromStatus(error)) : resolve(answer),
            );
        });
    } finally {
        client.close();
    }
}

/** Wait until a channel is connected; false where it has failed to. @param {any} channel */
function connects(channel) {
    const { READY, TRANSIENT_FAILURE, SHUTDOWN } = grpc.connectivityState,
        deadline = Date.now() + DIAL_SECONDS * 1000;
    return new Promise((resolve) => {
        const look = () => {
            const state = channel.getConnectivityState(true);
            if ([READY, TRANSIENT_FAILURE, SHUTDOWN].includes(state)) return resolve(state === READY);
            channel.watchConnectivityState(state, deadline, (/** @type {Error | undefined} */ late) =>
                late ? resolve(false) : look(),
            );
        };
        look();
    });
}

/** One stream to a parent. Whatever ends it, `ended` gets the reason; nothing else of it rejects or throws. */
export class Link {
    /** @param {any} client @param {any} call @param {(message: any) => void} onMessage may throw: then the link ends */
    constructor(client, call, onMessage) {
        this.open = true;
        /** @type {Promise<LinkError>} */
        this.ended = new Promise((resolve) => {
            this.end = (/** @type {LinkError} */ reason) => {
                if (!this.open) return;
                this.open = false;
                call.cancel();
                client.close();
                resolve(reason);
            };
        });
        this.call = call;
        call.on('error', () => {}); // the status says it
        call.on('status', (/** @type {any} */ status) =>
            this.end(
                status.code === grpc.status.OK
                    ? new LinkError('the other side has ended the link')
                    : fromStatus(status),
            ),
        );
        call.on('data', (/** @type {any} */ message) => {
            if (!this.open) return; // what came with the word that ends the link is of the past too
            try {
                onMessage(message);
            } catch (error) {
                this.end(
                    error instanceof LinkError ? error : new ProtocolError(String(/** @type {Error} */ (error).stack)),
                );
            }
        });
    }

    /** @param {string} address @param {'Work' | 'Heartbeat'} rpc @param {(message: any) => void} onMessage */
    static async dial(address, rpc, onMessage) {
        const client = new services.SphereService(address, grpc.credentials.createInsecure(), {
            ...OPTIONS,
            ...LIMITS,
        });
        if (!(await connects(client.getChannel()))) {
            client.close();
            throw new LinkError(`nobody answers at ${address}`, 'UnreachableError');
        }
        return new Link(client, client[rpc](), onMessage);
    }

    /** Send a message; resolves when there is room for the next, or the link has ended. @param {any} message */
    send(message) {
        const sent = new Promise((resolve) => this.call.write(message, resolve));
        return Promise.race([sent, this.ended]);
    }

    /** End this side in order: what was sent arrives. */
    async finish() {
        this.call.end();
        const timer = setTimeout(() => this.end(new LinkError('ended here')), LAST_WORDS_MS);
        await this.ended;
        clearTimeout(timer);
    }
}
