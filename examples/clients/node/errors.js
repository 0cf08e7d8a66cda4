/** What can go wrong, with the exit code that it ends this process with, and what a status of gRPC means. */
import { status } from '@grpc/grpc-js';

/** Ends the worker. */
export class WorkerError extends Error {
    exitCode = 1;
}
/** Wrong flags. */
export class UsageError extends WorkerError {
    exitCode = 2;
}
/** The task or its data cannot be loaded, or are not this worker's. */
export class TaskError extends WorkerError {
    exitCode = 3;
}
/** Control or the run refused, or nobody answered. */
export class RefusedError extends WorkerError {
    exitCode = 5;
}
/** Ends a link, not the worker: it dials again. `name` is that of the other side's error, where it said one. */
export class LinkError extends Error {
    /** @param {string} message @param {string} name */
    constructor(message, name = 'LinkClosedError') {
        super(message);
        this.name = name;
    }
}
/** What the other side sent breaks the protocol: as a client, a worker can send no status, and just ends the link. */
export class ProtocolError extends LinkError {
    /** @param {string} message */
    constructor(message) {
        super(message, 'ProtocolError');
    }
}
/** Control has given this worker's id to another: it enrolls anew. */
export class StaleError extends Error {}

/** Where the details name no error: docs/protocol.md, Status codes. */
const BY_CODE = /** @type {Record<number, string>} */ ({
    [status.FAILED_PRECONDITION]: 'RefusedError',
    [status.UNIMPLEMENTED]: 'RefusedError',
    [status.NOT_FOUND]: 'WrongRunError',
    [status.ABORTED]: 'StaleError',
    [status.INVALID_ARGUMENT]: 'ProtocolError',
    [status.OUT_OF_RANGE]: 'CreditError',
    [status.RESOURCE_EXHAUSTED]: 'MessageTooLargeError',
    [status.DATA_LOSS]: 'ChecksumError',
    [status.UNAVAILABLE]: 'UnreachableError',
    [status.DEADLINE_EXCEEDED]: 'UnreachableError',
    [status.INTERNAL]: 'ArmillaryError',
});

/** The error that a status means; its details are `Name: sentence`. @param {{code: number, details: string}} ended */
export function fromStatus({ code, details }) {
    const named = /^([A-Z]\w*Error): ([^]*)$/.exec(details);
    if (named) return new LinkError(named[2], named[1]);
    return new LinkError(details || status[code], BY_CODE[code] ?? 'LinkClosedError');
}

/** What to do about an answer to a hello that is no welcome. Anything but these: the next fallback. A link that ends
 * later is dialled again from the nearest ancestor on, whatever it ended with.
 * @param {LinkError} error @param {boolean} fromControl */
export function afterRefusal(error, fromControl) {
    if (!fromControl) return 'fallback'; // at another address another run may have moved in
    if (error.name === 'StaleError') return 'enroll';
    return ['VersionMismatchError', 'FingerprintError', 'WrongRunError'].includes(error.name) ? 'end' : 'fallback';
}
