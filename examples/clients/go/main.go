// Command armillary-client talks to a running control: status, watch, pause, resume, spheres, checkpoint, weights.
//
// It shows what a client of spheres.v1.ControlService has to do, and is no library. docs/clients.md explains the bytes.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"sort"
	"strings"
	"sync/atomic"
	"syscall"

	"github.com/golang/protobuf/jsonpb"
	"github.com/golang/protobuf/proto"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/grpclog"
	"google.golang.org/grpc/status"

	pb "spheres/v1"
)

// Exit codes: those of control-cli (docs/cli.md).
const (
	exitError       = 1
	exitUsage       = 2
	exitCheckpoint  = 4
	exitUnreachable = 5
	exitState       = 6
)

const usage = `usage: armillary-client [-control HOST:PORT] COMMAND

  status [-json]              how the run is
  watch [-json] [-after N]    what happens, until the run is over; goes on by itself after a cut link
  pause                       finish the step in hand, then wait
  resume                      go on
  spheres [-json]             who takes part
  checkpoint                  save after the step in hand, and say where
  weights -o FILE             write the weights as FILE.safetensors, checked
  vectors DIR                 decode and recompute every file of protos/testdata

The address is that of -control, else of the environment variable ARMILLARY_CONTROL.
Exit codes: 0 done, 1 error, 2 usage, 4 checkpoint, 5 nobody answers or a refusal, 6 the run's state does not allow it,
128+N ended by signal N, 130 for Ctrl+C.
`

// usageError is what is wrong with the command line.
type usageError string

func (e usageError) Error() string { return string(e) }

// unreachableError says that nobody answers.
type unreachableError string

func (e unreachableError) Error() string { return string(e) }

func main() {
	// gRPC's own lines are for those who look for a fault in it: GRPC_GO_LOG_SEVERITY_LEVEL=info brings them back
	if os.Getenv("GRPC_GO_LOG_SEVERITY_LEVEL") == "" {
		grpclog.SetLoggerV2(grpclog.NewLoggerV2(io.Discard, io.Discard, io.Discard))
	}
	ctx, stop := context.WithCancel(context.Background())
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, os.Interrupt, syscall.SIGTERM)
	var caught atomic.Int32
	go func() {
		caught.Store(int32((<-signals).(syscall.Signal)))
		stop()
		signal.Stop(signals) // a second one ends at once
	}()
	err := run(ctx, os.Args[1:], os.Stdout)
	if err == nil {
		return
	}
	if number := caught.Load(); number != 0 { // what it has cut off is no error
		os.Exit(128 + int(number))
	}
	fmt.Fprintf(os.Stderr, "error: %s\n", words(err))
	os.Exit(exitCode(err))
}

// run does what the command line says.
func run(ctx context.Context, args []string, out io.Writer) error {
	flags := newFlags("armillary-client")
	address := flags.String("control", os.Getenv("ARMILLARY_CONTROL"), "")
	if err := parse(flags, args); err != nil {
		if errors.Is(err, flag.ErrHelp) {
			fmt.Fprint(out, usage)
			return nil
		}
		return err
	}
	if flags.NArg() == 0 {
		return usageError("no command; try armillary-client -help")
	}
	name, rest := flags.Arg(0), flags.Args()[1:]
	command, known := commands[name]
	if !known {
		return usageError(fmt.Sprintf("no command %q; try armillary-client -help", name))
	}
	flags = newFlags(name)
	options := options{}
	command.flags(flags, &options)
	if err := parse(flags, rest); err != nil {
		if errors.Is(err, flag.ErrHelp) {
			fmt.Fprint(out, usage)
			return nil
		}
		return err
	}
	if flags.NArg() != command.arguments {
		return usageError(fmt.Sprintf("%s takes %d arguments, not %d; try armillary-client -help", name, command.arguments, flags.NArg()))
	}
	options.argument = flags.Arg(0)
	if name == "vectors" {
		return vectors(options.argument, out)
	}
	if name == "weights" && options.file == "" {
		return usageError("weights needs -o FILE.safetensors")
	}
	if *address == "" {
		return usageError("no address: give -control HOST:PORT, or set ARMILLARY_CONTROL; it is the first line of the run's file address")
	}
	client, err := dial(*address)
	if err != nil {
		return err
	}
	defer client.close()
	return command.do(ctx, client, options, out)
}

// options are the flags of all commands.
type options struct {
	json     bool
	after    int64
	file     string
	argument string
}

type command struct {
	flags     func(*flag.FlagSet, *options)
	arguments int
	do        func(context.Context, *client, options, io.Writer) error
}

func jsonFlag(f *flag.FlagSet, o *options) { f.BoolVar(&o.json, "json", false, "") }
func noFlags(*flag.FlagSet, *options)      {}

var commands = map[string]command{
	"status":     {flags: jsonFlag, do: showStatus},
	"watch":      {flags: func(f *flag.FlagSet, o *options) { jsonFlag(f, o); f.Int64Var(&o.after, "after", 0, "") }, do: showEvents},
	"pause":      {flags: noFlags, do: pause},
	"resume":     {flags: noFlags, do: resume},
	"spheres":    {flags: jsonFlag, do: showSpheres},
	"checkpoint": {flags: noFlags, do: checkpoint},
	"weights":    {flags: func(f *flag.FlagSet, o *options) { f.StringVar(&o.file, "o", "", "") }, do: saveWeights},
	"vectors":    {flags: noFlags, arguments: 1},
}

func newFlags(name string) *flag.FlagSet {
	flags := flag.NewFlagSet(name, flag.ContinueOnError)
	flags.SetOutput(io.Discard) // an error is said once, by main
	return flags
}

func parse(flags *flag.FlagSet, args []string) error {
	err := flags.Parse(args)
	if err != nil && !errors.Is(err, flag.ErrHelp) {
		return usageError(err.Error() + "; try armillary-client -help")
	}
	return err
}

// words returns what an error of control says without its name: details are "Name: sentence".
func words(err error) string {
	found, ok := status.FromError(err)
	if !ok {
		return err.Error()
	}
	if name, sentence := named(found.Message()); name != "" {
		return sentence
	}
	return fmt.Sprintf("%s (%s)", found.Message(), found.Code())
}

func exitCode(err error) int {
	var wrong usageError
	var nobody unreachableError
	switch {
	case errors.As(err, &wrong):
		return exitUsage
	case errors.As(err, &nobody):
		return exitUnreachable
	}
	found, ok := status.FromError(err)
	if !ok {
		return exitError
	}
	switch name, _ := named(found.Message()); name { // the name is more exact than the code
	case "RunStateError":
		return exitState
	case "CheckpointError":
		return exitCheckpoint
	}
	switch found.Code() {
	case codes.Unavailable, codes.DeadlineExceeded, codes.FailedPrecondition, codes.Unimplemented, codes.Unauthenticated, codes.PermissionDenied:
		return exitUnreachable
	}
	return exitError
}

// ---- what the commands print

// stateName returns a state as everywhere else: running, completed, ...
func stateName(state pb.RunState) string {
	return strings.ToLower(strings.TrimPrefix(state.String(), "RUN_STATE_"))
}

func putJSON(out io.Writer, message proto.Message) error {
	text, err := (&jsonpb.Marshaler{OrigName: true, EmitDefaults: true}).MarshalToString(message)
	if err == nil {
		fmt.Fprintln(out, text)
	}
	return err
}

func putRun(out io.Writer, run *pb.Run) {
	state := stateName(run.State)
	if run.Reason != "" {
		state += " (" + run.Reason + ")"
	}
	fmt.Fprintf(out, "%s: %s, step %d/%d, weights version %d\n", run.RunId, state, run.Step, run.TotalSteps, run.WeightsVersion)
}

func showStatus(ctx context.Context, c *client, o options, out io.Writer) error {
	run, err := c.status(ctx)
	if err != nil {
		return err
	}
	if o.json {
		return putJSON(out, run)
	}
	putRun(out, run)
	names := make([]string, 0, len(run.Metrics))
	for name := range run.Metrics {
		names = append(names, name)
	}
	sort.Strings(names)
	for _, name := range names {
		fmt.Fprintf(out, "%s %g\n", name, run.Metrics[name])
	}
	fmt.Fprintf(out, "spheres %d/%d\n", run.LivingSpheresCount, run.KnownSpheresCount)
	for _, line := range [][2]string{{"bottleneck", run.Bottleneck}, {"checkpoint", run.LatestCheckpoint}, {"error", run.Error}} {
		if line[1] != "" {
			fmt.Fprintln(out, line[0], line[1])
		}
	}
	return nil
}

func showEvents(ctx context.Context, c *client, o options, out io.Writer) error {
	return c.watch(ctx, o.after, func(event *pb.WatchRunResponse) error {
		if o.json { // the record as control has made it, with the number to go on after
			fmt.Fprintf(out, "{\"event_id\": %d, \"record\": %s}\n", event.EventId, event.RecordJson)
		} else {
			fmt.Fprintln(out, event.EventId, event.Event, event.RecordJson)
		}
		return nil
	})
}

func pause(ctx context.Context, c *client, o options, out io.Writer) error {
	run, err := c.pause(ctx)
	if err == nil {
		putRun(out, run)
	}
	return err
}

func resume(ctx context.Context, c *client, o options, out io.Writer) error {
	run, err := c.resume(ctx)
	if err == nil {
		putRun(out, run)
	}
	return err
}

func showSpheres(ctx context.Context, c *client, o options, out io.Writer) error {
	return c.spheres(ctx, func(sphere *pb.Sphere) error {
		if o.json {
			return putJSON(out, sphere)
		}
		report := sphere.GetReport()
		_, err := fmt.Fprintf(out, "%s %s below %s, %s on %s:%d, %d samples\n", sphere.SphereId, sphere.State,
			sphere.ParentId, report.GetRole(), report.GetHost(), report.GetPid(), report.GetSamplesCount())
		return err
	})
}

func checkpoint(ctx context.Context, c *client, o options, out io.Writer) error {
	saved, err := c.checkpoint(ctx)
	if err == nil {
		fmt.Fprintln(out, saved.Path)
	}
	return err
}
