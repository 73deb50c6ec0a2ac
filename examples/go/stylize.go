// Paints a photo in the style of a painting: stylize SERVER PHOTO PAINTING SIZE OUT.png [KEEPALIVE_S]
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"strconv"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/encoding"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	pb "gramophone/v1"
)

const (
	largestMessage = 64 << 20 // a PNG of 2048 px can be larger than gRPC's default of 4 MiB
	inline         = 2 << 20  // two images of at most this size fit in a request at every server
	chunk          = 64 << 10
)

func main() {
	if len(os.Args) < 6 {
		fmt.Fprintln(os.Stderr, "usage: stylize SERVER PHOTO PAINTING SIZE OUT.png [KEEPALIVE_S]")
		os.Exit(2)
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt) // Ctrl-C cancels the call, which stops the job
	defer stop()
	if err := stylize(ctx, os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "stylize:", message(err))
		if ctx.Err() != nil {
			os.Exit(130)
		}
		os.Exit(1)
	}
}

func stylize(ctx context.Context, args []string) error {
	size, err := strconv.ParseInt(args[3], 10, 32)
	if err != nil {
		return err
	}
	content, err := os.ReadFile(args[1])
	if err != nil {
		return err
	}
	style, err := os.ReadFile(args[2])
	if err != nil {
		return err
	}
	connection, err := connect(args[0], args[5:])
	if err != nil {
		return err
	}
	defer connection.Close()
	service := pb.NewStyleTransferServiceClient(connection)
	photo, err := image(ctx, service, content)
	if err != nil {
		return err
	}
	painting, err := image(ctx, service, style)
	if err != nil {
		return err
	}
	spec := &pb.JobSpec{
		Content: photo,
		Styles:  []*pb.StyleSource{{Image: painting}},
		Recipe:  &pb.Recipe{Size: proto.Int32(int32(size))},
	}
	stream, err := service.StylizeStream(ctx, &pb.StylizeStreamRequest{Spec: spec})
	if err != nil {
		return err
	}
	for {
		response, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return nil
		} else if err != nil {
			return err
		}
		switch event := response.Event.Event.(type) {
		case *pb.JobEvent_Progress:
			fmt.Printf("iteration %d of %d\n", event.Progress.Iteration, event.Progress.Iterations)
		case *pb.JobEvent_Result:
			picture := event.Result.Image
			fmt.Printf("%s: %d x %d px\n", args[4], picture.Width, picture.Height)
			if err := os.WriteFile(args[4], picture.Data, 0o644); err != nil {
				return err
			}
		}
	}
}

// image is a field of a request. A large image is uploaded, and the field has its digest.
func image(ctx context.Context, service pb.StyleTransferServiceClient, data []byte) (*pb.ImageSource, error) {
	if len(data) <= inline {
		return &pb.ImageSource{Source: &pb.ImageSource_Data{Data: data}}, nil
	}
	upload, err := service.UploadImage(ctx)
	if err != nil {
		return nil, err
	}
	for len(data) > 0 {
		size := len(data)
		if size > chunk {
			size = chunk
		}
		if err := upload.Send(&pb.UploadImageRequest{Chunk: data[:size]}); err != nil {
			break // the server has refused it; CloseAndRecv returns why
		}
		data = data[size:]
	}
	stored, err := upload.CloseAndRecv()
	if err != nil {
		return nil, err
	}
	return &pb.ImageSource{Source: &pb.ImageSource_Digest{Digest: stored.Digest}}, nil
}

// connect takes the seconds between two pings, if there are any, as a list of at most one text.
func connect(server string, keepaliveS []string) (*grpc.ClientConn, error) {
	options := []grpc.DialOption{grpc.WithInsecure(), grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(largestMessage))}
	for _, text := range keepaliveS {
		every, err := time.ParseDuration(text + "s")
		if err != nil {
			return nil, err
		}
		options = append(options, grpc.WithKeepaliveParams(keepalive.ClientParameters{Time: every}))
	}
	return grpc.Dial(server, options...)
}

// message is the text of an error, with the code and the reason of a call's.
func message(err error) string {
	failed, ofCall := status.FromError(err)
	if !ofCall {
		return err.Error()
	}
	text := fmt.Sprint(failed.Message(), " (", failed.Code())
	for _, detail := range failed.Details() {
		if info, ok := detail.(*errdetails.ErrorInfo); ok {
			text += ", " + info.Reason
		}
	}
	return text + ")"
}

// codec replaces the codec of gRPC 1.33, Debian 12's, which cannot encode messages of google.golang.org/protobuf. Newer
// versions of gRPC need none of the following.
type codec struct{}

func (codec) Name() string                          { return "proto" }
func (codec) Marshal(v interface{}) ([]byte, error) { return proto.Marshal(v.(proto.Message)) }
func (codec) Unmarshal(data []byte, v interface{}) error {
	return proto.Unmarshal(data, v.(proto.Message))
}

func init() { encoding.RegisterCodec(codec{}) }
