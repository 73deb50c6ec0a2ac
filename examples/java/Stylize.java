// Paints a photo in the style of a painting: Stylize SERVER PHOTO PAINTING SIZE OUT.png [KEEPALIVE_S]

import static java.util.concurrent.TimeUnit.SECONDS;

import com.google.protobuf.ByteString;
import com.google.protobuf.InvalidProtocolBufferException;
import google.rpc.RpcErrors;
import gramophone.v1.StyleTransfer.ImageSource;
import gramophone.v1.StyleTransfer.JobSpec;
import gramophone.v1.StyleTransfer.Recipe;
import gramophone.v1.StyleTransfer.StyleSource;
import gramophone.v1.StyleTransfer.StylizeStreamRequest;
import gramophone.v1.StyleTransfer.UploadImageRequest;
import gramophone.v1.StyleTransfer.UploadImageResponse;
import gramophone.v1.StyleTransferServiceGrpc;
import io.grpc.Context;
import io.grpc.ManagedChannel;
import io.grpc.ManagedChannelBuilder;
import io.grpc.Metadata;
import io.grpc.StatusRuntimeException;
import io.grpc.stub.StreamObserver;
import java.io.IOException;
import java.nio.file.Files;
import java.nio.file.Path;
import java.util.concurrent.CompletableFuture;
import java.util.concurrent.CountDownLatch;
import java.util.concurrent.ExecutionException;

class Stylize {
  static final int LARGEST_MESSAGE = 64 << 20; // bytes; gRPC's default is 4 MiB, and a PNG of 2048 px can be larger
  static final int INLINE = 2 << 20; // bytes; two images of at most this size fit in a request at every server
  static final int CHUNK = 64 << 10; // bytes
  static final Metadata.Key<byte[]> DETAILS =
      Metadata.Key.of("grpc-status-details-bin", Metadata.BINARY_BYTE_MARSHALLER);

  public static void main(String[] args) throws Exception {
    if (args.length < 5) {
      System.err.println("usage: Stylize SERVER PHOTO PAINTING SIZE OUT.png [KEEPALIVE_S]");
      System.exit(2);
    }
    var builder = ManagedChannelBuilder.forTarget(args[0]).usePlaintext().maxInboundMessageSize(LARGEST_MESSAGE);
    if (args.length > 5) builder.keepAliveTime(Long.parseLong(args[5]), SECONDS);
    var channel = builder.build();
    var call = Context.current().withCancellation();
    // Ctrl-C ends the program with exit code 130. It first cancels the call, which stops the job.
    var ended = new CountDownLatch(1);
    Runtime.getRuntime().addShutdownHook(new Thread(() -> cancel(call, channel, ended)));
    var error = "";
    try {
      call.call(() -> stylize(channel, args));
    } catch (StatusRuntimeException failure) {
      error = "stylize: " + message(failure);
    } catch (IOException | NumberFormatException failure) {
      error = "stylize: " + failure;
    } finally {
      if (!error.isEmpty()) System.err.println(error);
      ended.countDown();
    }
    if (!error.isEmpty()) System.exit(1);
  }

  static Void stylize(ManagedChannel channel, String[] args) throws Exception {
    var spec = JobSpec.newBuilder()
                   .setContent(image(channel, args[1]))
                   .addStyles(StyleSource.newBuilder().setImage(image(channel, args[2])))
                   .setRecipe(Recipe.newBuilder().setSize(Integer.parseInt(args[3])));
    var request = StylizeStreamRequest.newBuilder().setSpec(spec).build();
    var responses = StyleTransferServiceGrpc.newBlockingStub(channel).stylizeStream(request);
    while (responses.hasNext()) {
      var event = responses.next().getEvent();
      if (event.hasProgress()) {
        System.out.printf(
            "iteration %d of %d%n", event.getProgress().getIteration(), event.getProgress().getIterations());
      } else if (event.hasResult()) {
        var picture = event.getResult().getImage();
        Files.write(Path.of(args[4]), picture.getData().toByteArray());
        System.out.printf("%s: %d x %d px%n", args[4], picture.getWidth(), picture.getHeight());
      }
    }
    return null;
  }

  /** An image as a field of a request: a large one is uploaded, and the field has its digest. */
  static ImageSource image(ManagedChannel channel, String path) throws Exception {
    var data = ByteString.copyFrom(Files.readAllBytes(Path.of(path)));
    if (data.size() <= INLINE) return ImageSource.newBuilder().setData(data).build();
    var stored = new CompletableFuture<UploadImageResponse>();
    var upload = StyleTransferServiceGrpc.newStub(channel).uploadImage(
        new StreamObserver<UploadImageResponse>() {
          @Override
          public void onNext(UploadImageResponse response) {
            stored.complete(response);
          }

          @Override
          public void onError(Throwable error) {
            stored.completeExceptionally(error);
          }

          @Override
          public void onCompleted() {}
        });
    for (int at = 0; at < data.size() && !stored.isDone(); at += CHUNK) {
      var chunk = data.substring(at, Math.min(at + CHUNK, data.size()));
      upload.onNext(UploadImageRequest.newBuilder().setChunk(chunk).build()); // waits in memory until it can be sent
    }
    if (!stored.isDone()) upload.onCompleted();
    try {
      return ImageSource.newBuilder().setDigest(stored.get().getDigest()).build();
    } catch (ExecutionException error) {
      throw (StatusRuntimeException) error.getCause();
    }
  }

  /** Cancels the call, and waits for its end and for what the program says about it. */
  static void cancel(Context.CancellableContext call, ManagedChannel channel, CountDownLatch ended) {
    call.cancel(null);
    try {
      channel.shutdown().awaitTermination(5, SECONDS);
      ended.await(5, SECONDS);
    } catch (InterruptedException error) {
      channel.shutdownNow();
    }
  }

  /** The text of a call's error, its code and, if the server sent one, its reason. */
  static String message(StatusRuntimeException error) throws InvalidProtocolBufferException {
    var cause = error.getCause() == null ? "" : ": " + error.getCause().getMessage(); // such as "connection refused"
    var text = error.getStatus().getDescription() + cause + " (" + error.getStatus().getCode();
    var details = error.getTrailers() == null ? null : error.getTrailers().get(DETAILS);
    if (details == null) return text + ")";
    for (var detail : RpcErrors.Status.parseFrom(details).getDetailsList()) {
      if (detail.getTypeUrl().endsWith("/google.rpc.ErrorInfo"))
        text += ", " + RpcErrors.ErrorInfo.parseFrom(detail.getValue()).getReason();
    }
    return text + ")";
  }
}
