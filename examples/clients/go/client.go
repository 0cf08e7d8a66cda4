package main

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/status"

	pb "spheres/v1"
)

const (
	// for a call that is answered at once
	deadline = 10 * time.Second
	// for what waits for the end of a step, and then for a disk or a download
	longDeadline = 10 * time.Minute
	// for which a cut watch, or a call that may be repeated, tries to come back, and between two tries
	patience = 30 * time.Second
	pauseFor = 250 * time.Millisecond
	// between two connections, at most, and for one
	longestPause   = 2 * time.Second
	connectTimeout = 5 * time.Second
	// most of one message; a chunk has at most 1 MiB, a manifest may have many tensors
	maxMessageBytes = 64 << 20
)

// client is one channel to one control.
type client struct {
	address string
	conn    *grpc.ClientConn
	stub    pb.ControlServiceClient
}

// dial makes a client; nothing is sent before the first call.
func dial(address string) (*client, error) {
	if _, port, err := net.SplitHostPort(address); err != nil || port == "" {
		return nil, usageError(fmt.Sprintf("%q is no address HOST:PORT", address))
	}
	// gRPC's own pauses between two connections grow to 120 s, and a watch would miss the control that is back
	pauses := backoff.DefaultConfig
	pauses.BaseDelay, pauses.MaxDelay = pauseFor, longestPause
	conn, err := grpc.Dial(address, grpc.WithInsecure(),
		grpc.WithConnectParams(grpc.ConnectParams{Backoff: pauses, MinConnectTimeout: connectTimeout}),
		grpc.WithNoProxy(), // one of the environment is for the web
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxMessageBytes)),
		// a watch that hears nothing for long must notice that its link is gone
		grpc.WithKeepaliveParams(keepalive.ClientParameters{Time: 20 * time.Second, Timeout: 20 * time.Second}))
	if err != nil {
		return nil, usageError(fmt.Sprintf("%s is no address HOST:PORT: %v", address, err))
	}
	return &client{address, conn, pb.NewControlServiceClient(conn)}, nil
}

func (c *client) close() { c.conn.Close() }

// call does one unary call within a deadline. An error of the network says who was not reached.
func (c *client) call(ctx context.Context, within time.Duration, do func(context.Context) error) error {
	ctx, cancel := context.WithTimeout(ctx, within)
	defer cancel()
	return c.meant(do(ctx))
}

// meant makes clear what gRPC itself says; what control says stands.
func (c *client) meant(err error) error {
	found, ok := status.FromError(err)
	if err == nil || !ok {
		return err
	}
	switch found.Code() {
	case codes.Unavailable, codes.DeadlineExceeded:
		if name, _ := named(found.Message()); name == "" && !strings.HasPrefix(found.Message(), "control is starting") {
			return unreachableError(fmt.Sprintf("control at %s does not answer; is it running, and is the address right?", c.address))
		}
	case codes.Unimplemented:
		return unreachableError(fmt.Sprintf("%s is no control, or one of another version", c.address))
	}
	return err
}

// named cuts details as control writes them, "NameError: sentence"; the name of others is "".
func named(details string) (name, sentence string) {
	name, sentence, _ = strings.Cut(details, ": ")
	if !strings.HasSuffix(name, "Error") || strings.Contains(name, " ") {
		return "", details
	}
	return name, sentence
}

func (c *client) status(ctx context.Context) (run *pb.Run, err error) {
	err = c.call(ctx, deadline, func(ctx context.Context) error {
		answer, err := c.stub.GetRun(ctx, &pb.GetRunRequest{})
		run = answer.GetRun()
		return err
	})
	return run, err
}

func (c *client) pause(ctx context.Context) (run *pb.Run, err error) {
	err = c.call(ctx, deadline, func(ctx context.Context) error {
		answer, err := c.stub.PauseRun(ctx, &pb.PauseRunRequest{})
		run = answer.GetRun()
		return err
	})
	return run, err
}

func (c *client) resume(ctx context.Context) (run *pb.Run, err error) {
	err = c.call(ctx, deadline, func(ctx context.Context) error {
		answer, err := c.stub.ResumeRun(ctx, &pb.ResumeRunRequest{})
		run = answer.GetRun()
		return err
	})
	return run, err
}

// spheres hands on every sphere, page by page.
func (c *client) spheres(ctx context.Context, each func(*pb.Sphere) error) error {
	for token := ""; ; {
		var page *pb.ListSpheresResponse
		err := c.call(ctx, deadline, func(ctx context.Context) (err error) {
			page, err = c.stub.ListSpheres(ctx, &pb.ListSpheresRequest{PageToken: token})
			return err
		})
		if err != nil {
			return err
		}
		for _, sphere := range page.Spheres {
			if err := each(sphere); err != nil {
				return err
			}
		}
		if token = page.NextPageToken; token == "" {
			return nil
		}
	}
}

// checkpoint saves one. All tries of one wish have the same request id, so that it is saved once: an answer that was
// lost is given again.
func (c *client) checkpoint(ctx context.Context) (saved *pb.Checkpoint, err error) {
	id := make([]byte, 16)
	if _, err := rand.Read(id); err != nil {
		return nil, err
	}
	request := &pb.CreateCheckpointRequest{RequestId: hex.EncodeToString(id)}
	var lost time.Time
	for {
		err = c.call(ctx, longDeadline, func(ctx context.Context) error {
			answer, err := c.stub.CreateCheckpoint(ctx, request)
			saved = answer.GetCheckpoint()
			return err
		})
		if !isUnreachable(err) || !goOn(ctx, &lost) {
			return saved, err
		}
	}
}

// watch hands on events until the run is over. After a cut it goes on behind the last event that it has seen.
func (c *client) watch(ctx context.Context, after int64, each func(*pb.WatchRunResponse) error) error {
	if _, err := c.status(ctx); err != nil {
		return err // an address where nobody is, fails here, not after so long a patience
	}
	var lost time.Time
	over := false
	for {
		stream, err := c.stub.WatchRun(ctx, &pb.WatchRunRequest{AfterEventId: after})
		if err == nil {
			// control has taken it up, however long the next event may take
			if header, _ := stream.Header(); len(header.Get("watch")) > 0 {
				lost = time.Time{}
			}
		}
		for err == nil {
			var event *pb.WatchRunResponse
			if event, err = stream.Recv(); err != nil {
				break
			}
			after, over = event.EventId, over || isEnd(event)
			if err := each(event); err != nil {
				return err
			}
		}
		switch {
		case err == io.EOF || over: // control may be gone before it can say that this was all
			return nil
		case status.Code(err) == codes.OutOfRange:
			return fmt.Errorf("control no longer keeps the events after %d: read journal.jsonl of the run, then watch from now on", after)
		case status.Code(err) != codes.Unavailable || !goOn(ctx, &lost):
			return c.meant(err)
		}
	}
}

// goOn waits a little before another try; false where there has been no answer for too long, or on Ctrl+C.
func goOn(ctx context.Context, lost *time.Time) bool {
	if lost.IsZero() {
		*lost = time.Now()
	}
	select {
	case <-ctx.Done():
		return false
	case <-time.After(pauseFor):
		return time.Since(*lost) < patience
	}
}

func isUnreachable(err error) bool {
	_, is := err.(unreachableError)
	return is
}

// isEnd says whether after this event there will be none.
func isEnd(event *pb.WatchRunResponse) bool {
	var record struct{ State string }
	if event.Event != "state" || json.Unmarshal([]byte(event.RecordJson), &record) != nil {
		return false
	}
	return record.State == "completed" || record.State == "stopped" || record.State == "error"
}
