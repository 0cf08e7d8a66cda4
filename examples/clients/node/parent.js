/**
 * The link to a parent: dials, says hello, keeps both streams until they end, dials again.
 *
 * What the messages of a step mean is the leaf's. Here are the fallbacks (N11), the lease (N10), the wait of an orphan.
 */
import { setTimeout as sleep } from 'node:timers/promises';
import { LinkError, ProtocolError, RefusedError, StaleError, afterRefusal } from './errors.js';
import { Link } from './link.js';

/** Seconds that a parent has to answer a hello: it may itself be loading its task. */
const WELCOME_SECONDS = 20;
/** Milliseconds before dialling again, and up to which they are doubled each time. */
const PAUSE = 50,
    LONGEST_PAUSE = 1_000;
/** Looks at the clock per lease. */
const TICKS = 16;

/** @typedef {{id: string, incarnation: string, address: string}} Ancestor */

/** Mutable state: the ancestors to dial, nearest last; the present link; what was heard when, by a monotonic clock. */
export class Parent {
    /** @type {Link | null} the present Work stream, once there was a welcome */
    link = null;
    #heard = 0;
    #ticked = performance.now();
    /** since when there is no way to control; null where there is one @type {number | null} */
    #aloneSince = performance.now();
    /** the parent whose lease ran out: it is dialled last */
    #silent = '';
    #writing = false;
    #closed = false;
    #wakeSleeper = new AbortController();

    /** @param {import('./leaf.js').Leaf} leaf @param {Ancestor[]} ancestors
     * @param {{hello: any, report: () => any, directed: (directive: any) => void, changed: () => void,
     *   log: (text: string) => void, orphanMs: number}} options `changed`: the leaf may have something to compute */
    constructor(leaf, ancestors, options) {
        this.leaf = leaf;
        this.ancestors = ancestors;
        this.options = options;
        this.patience = leaf.config.patienceMs;
        this.ticker = setInterval(() => this.#tick(), this.patience / TICKS);
    }

    get id() {
        return this.ancestors[this.ancestors.length - 1].id;
    }

    /** Keep a link until closed. Throws RefusedError or StaleError for what no other attempt cures. */
    async run() {
        let pause = PAUSE,
            last = new LinkError('none was made');
        while (!this.#closed) {
            for (const ancestor of this.#inOrder()) {
                const began = performance.now(),
                    { linked, reason } = await this.#work(ancestor);
                if (this.#closed) return;
                last = reason;
                if (linked) this.options.log(`the link to ${ancestor.id} has ended: ${reason.name}: ${reason.message}`);
                // a parent that ends every link at once is not dialled at full speed
                if (linked && performance.now() - began > LONGEST_PAUSE) pause = PAUSE;
                if (linked) break;
            }
            const left = (this.#aloneSince ??= performance.now()) + this.options.orphanMs - performance.now();
            if (left <= 0) {
                throw new RefusedError(
                    `no way to control for ${this.options.orphanMs / 1000} s (--orphan-timeout); ` +
                        `the last attempt: ${last.message}`,
                );
            }
            await sleep(Math.min(pause, left), null, { signal: this.#wakeSleeper.signal }).catch(() => {});
            pause = Math.min(2 * pause, LONGEST_PAUSE);
        }
    }

    /** End the link in order, and dial no more. */
    async close() {
        this.#closed = true;
        clearInterval(this.ticker);
        this.#wakeSleeper.abort();
        await this.link?.finish();
    }

    /** Leave the parent for another; where that one does not take this worker, it goes back (N11).
     * @param {Ancestor} target */
    move(target) {
        if ([this.leaf.id, this.id].includes(target.id)) return;
        this.ancestors.push(target);
        this.link?.end(new LinkError(`moving to ${target.id}`));
    }

    #inOrder() {
        const order = [...this.ancestors].reverse(),
            silent = this.#silent;
        this.#silent = '';
        return [...order.filter(({ id }) => id !== silent), ...order.filter(({ id }) => id === silent)];
    }

    /** Dial an ancestor and work for it until the link ends. @param {Ancestor} ancestor
     * @returns {Promise<{linked: boolean, reason: LinkError}>} */
    async #work(ancestor) {
        /** @type {Link} */
        let link;
        try {
            link = await Link.dial(ancestor.address, 'Work', (message) => this.#onMessage(link, ancestor, message));
        } catch (error) {
            return { linked: false, reason: /** @type {LinkError} */ (error) };
        }
        void link.send(this.leaf.hello(ancestor, this.options.hello));
        const late = setTimeout(() => {
            if (this.link !== link)
                link.end(new LinkError(`${ancestor.id} did not answer hello in ${WELCOME_SECONDS} s`));
        }, WELCOME_SECONDS * 1000);
        const reason = await link.ended;
        clearTimeout(late);
        const linked = this.link === link;
        this.link = null;
        if (linked || this.#closed) return { linked, reason };
        const next = afterRefusal(reason, ancestor === this.ancestors[0]);
        if (next === 'enroll') throw new StaleError(reason.message);
        if (next === 'end') throw new RefusedError(`${ancestor.id} refused: ${reason.message}`);
        return { linked, reason };
    }

    /** @param {Link} link @param {Ancestor} ancestor @param {any} message */
    #onMessage(link, ancestor, message) {
        this.#hear();
        if (message.welcome) {
            this.ancestors = this.#path(message.welcome.path, ancestor);
            if (this.link === link) return; // the parent itself has a new parent
            this.leaf.relinked();
            this.link = link;
            this.#aloneSince = null;
            this.options.log(`linked to ${ancestor.id}, session ${this.leaf.session}`);
            void this.#beat(link, ancestor);
        } else if (this.link !== link) {
            throw new ProtocolError(`${ancestor.id} answered hello with something else than welcome`);
        } else if (message.directive) {
            const { target_sphere_id: target } = message.directive;
            if (target === '' || target === this.leaf.id) this.options.directed(message.directive);
        } else {
            this.leaf.onResponse(message);
        }
        this.options.changed();
        this.wake();
    }

    /** The nodes from control to this parent: the next fallbacks.
     * @param {Ancestor[]} path @param {Ancestor} ancestor */
    #path(path, ancestor) {
        const name = 'RefusedError',
            from = path[path.length - 1]?.id;
        if (from !== ancestor.id)
            throw new LinkError(`the welcome came from ${from ?? 'nobody'}, not from ${ancestor.id}`, name);
        if (path.some(({ id }) => id === this.leaf.id))
            throw new LinkError(`${ancestor.id} is below this worker`, name);
        // the address that worked is kept: what a parent believes of its own may not be reachable from here
        const known = new Map(this.ancestors.map(({ id, address }) => [id, address]));
        return path.map((node) => ({ ...node, address: known.get(node.id) || node.address }));
    }

    /** Something may go up: send for as long as the leaf has something, and the link room. */
    async wake() {
        if (this.#writing) return;
        this.#writing = true;
        for (let link = this.link; link?.open; link = this.link) {
            if (this.#away()) break; // an item that is taken counts as sent
            const message = this.leaf.nextUp();
            if (!message) break;
            const began = performance.now();
            await link.send(message);
            this.leaf.wentUp((performance.now() - began) / 1000);
        }
        this.#writing = false;
    }

    /** Signs of life, on a stream of their own for as long as the link lives. Its end does not end the link.
     * @param {Link} link @param {Ancestor} ancestor */
    async #beat(link, ancestor) {
        const { heartbeatMs, runId } = this.leaf.config,
            { id, incarnation, session } = this.leaf;
        while (link.open) {
            /** @type {Link | undefined} */
            let beats;
            const answers = /** @type {((answer: any) => void)[]} */ ([]);
            try {
                beats = await Link.dial(ancestor.address, 'Heartbeat', (answer) => answers.shift()?.(answer));
                void link.ended.then((reason) => beats?.end(reason));
                while (beats.open && link.open) {
                    if (this.#away()) throw this.#fence();
                    const answered = new Promise((resolve) => answers.push(resolve));
                    const sent = BigInt(Math.round(performance.now() * 1e6)).toString();
                    await beats.send({
                        run_id: runId,
                        sphere_id: id,
                        incarnation,
                        session,
                        reports: [this.options.report()],
                        sent_nanos: sent,
                    });
                    const answer = await Promise.race([answered, beats.ended]);
                    if (answer instanceof LinkError || !link.open) break;
                    this.#hear();
                    this.#aloneSince = answer.alone_seconds > 0 ? this.#heard - 1000 * answer.alone_seconds : null;
                    await sleep(heartbeatMs);
                }
            } catch (error) {
                // nobody takes the stream, which ends nothing; or this process was away, which ends the link
                if (error instanceof LinkError && error.name === 'AwayError') link.end(error);
            }
            beats?.end(new LinkError('this heartbeat is over'));
            if (link.open) await sleep(heartbeatMs);
        }
    }

    // ---- the lease (N10)

    /** Whether this process was stopped for longer than the lease: others may have decided about it meanwhile. */
    #away() {
        return performance.now() - this.#ticked > this.patience;
    }

    /** Something came from the parent. Throws where this process was away: then nothing of it is handled. */
    #hear() {
        if (this.#away()) throw this.#fence();
        this.#heard = performance.now();
    }

    #fence() {
        return new LinkError(
            'this process was stopped for longer than --patience: its links are over (N10)',
            'AwayError',
        );
    }

    #tick() {
        const now = performance.now(),
            gap = now - this.#ticked;
        this.#ticked = now;
        if (gap > this.patience) {
            this.link?.end(this.#fence());
        } else if (gap <= (3 * this.patience) / TICKS && this.link && now - this.#heard > this.patience) {
            // who was not attentive itself judges nobody: the signs of life of others may lie here unread
            this.#silent = this.id;
            this.link.end(
                new LinkError(
                    `${this.id} gave no sign of life for ${((now - this.#heard) / 1000).toFixed(1)} s (--patience)`,
                ),
            );
        }
    }
}
