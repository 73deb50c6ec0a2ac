// Paints a photo in the style of a painting: stylize SERVER PHOTO PAINTING SIZE OUT.png [KEEPALIVE_S]

#include <grpcpp/grpcpp.h>

#include <atomic>
#include <charconv>
#include <csignal>
#include <fstream>
#include <iostream>
#include <iterator>
#include <stdexcept>
#include <string>
#include <thread>

#include "gramophone/v1/style_transfer.grpc.pb.h"
#include "rpc_errors.pb.h"

namespace {

constexpr int kLargestMessage = 64 << 20;  // bytes; gRPC's default is 4 MiB, and a PNG of 2048 px can be larger
constexpr std::size_t kInline = 2 << 20;   // bytes; two images of at most this size fit in a request at every server
constexpr std::size_t kChunk = 64 << 10;   // bytes

using Service = gramophone::v1::StyleTransferService::Stub;

std::string read(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) throw std::runtime_error(path + ": cannot be read");
  return {std::istreambuf_iterator<char>(file), {}};
}

int whole(const std::string& text) {
  int value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc() || *end) throw std::runtime_error(text + ": must be a whole number");
  return value;
}

void write(const std::string& path, const std::string& data) {
  std::ofstream file(path, std::ios::binary);
  if (!file.write(data.data(), data.size()).flush()) throw std::runtime_error(path + ": cannot be written");
}

// The reason in the details of an error, after a comma; empty if the server sent none.
std::string reason(const grpc::Status& status) {
  google::rpc::Status details;
  google::rpc::ErrorInfo info;
  details.ParseFromString(status.error_details());
  for (const auto& detail : details.details())
    if (detail.type_url() == "type.googleapis.com/google.rpc.ErrorInfo" && info.ParseFromString(detail.value()))
      return ", " + info.reason();
  return "";
}

// Sets an image of a request. A large one is uploaded, and the request has its digest.
grpc::Status set_image(Service& service, const std::string& data, gramophone::v1::ImageSource& image) {
  if (data.size() <= kInline) {
    image.set_data(data);
    return grpc::Status::OK;
  }
  grpc::ClientContext call;
  gramophone::v1::UploadImageRequest request;
  gramophone::v1::UploadImageResponse stored;
  const auto writer = service.UploadImage(&call, &stored);
  for (std::size_t at = 0; at < data.size(); at += kChunk) {
    request.set_chunk(data.substr(at, kChunk));
    if (!writer->Write(request)) break;  // the server has refused it; Finish returns why
  }
  writer->WritesDone();
  const grpc::Status status = writer->Finish();
  image.set_digest(stored.digest());
  return status;
}

grpc::Status stylize(Service& service, grpc::ClientContext& call, char** args) {
  gramophone::v1::StylizeStreamRequest request;
  auto& spec = *request.mutable_spec();
  spec.mutable_recipe()->set_size(whole(args[4]));
  const std::string photo = read(args[2]), painting = read(args[3]);
  grpc::Status stored = set_image(service, photo, *spec.mutable_content());
  if (stored.ok()) stored = set_image(service, painting, *spec.add_styles()->mutable_image());
  if (!stored.ok()) return stored;
  const auto reader = service.StylizeStream(&call, request);
  gramophone::v1::StylizeStreamResponse response;
  while (reader->Read(&response)) {
    if (response.event().has_progress()) {
      const auto& progress = response.event().progress();
      std::cout << "iteration " << progress.iteration() << " of " << progress.iterations() << std::endl;
    } else if (response.event().has_result()) {
      const auto& picture = response.event().result().image();
      write(args[5], picture.data());
      std::cout << args[5] << ": " << picture.width() << " x " << picture.height() << " px" << std::endl;
    }
  }
  return reader->Finish();
}

}  // namespace

int main(int count, char** args) try {
  if (count < 6) {
    std::cerr << "usage: stylize SERVER PHOTO PAINTING SIZE OUT.png [KEEPALIVE_S]\n";
    return 2;
  }
  grpc::ChannelArguments options;
  options.SetMaxReceiveMessageSize(kLargestMessage);
  if (count > 6) {
    options.SetInt(GRPC_ARG_KEEPALIVE_TIME_MS, 1000 * whole(args[6]));
    options.SetInt(GRPC_ARG_HTTP2_MAX_PINGS_WITHOUT_DATA, 0);  // otherwise gRPC stops pinging after two
  }
  // Ctrl-C cancels the call, which stops the job. A signal handler may not do that, so a thread waits for the signal,
  // which all other threads block. It may wait until the process has ended, so what it uses is never destroyed.
  sigset_t interrupt;
  sigemptyset(&interrupt);
  sigaddset(&interrupt, SIGINT);
  pthread_sigmask(SIG_BLOCK, &interrupt, nullptr);
  auto& call = *new grpc::ClientContext;
  static std::atomic<bool> interrupted = false;
  std::thread([&call, interrupt] {
    int number;
    sigwait(&interrupt, &number);
    interrupted = true;
    call.TryCancel();
  }).detach();

  const auto channel = grpc::CreateCustomChannel(args[1], grpc::InsecureChannelCredentials(), options);
  const auto service = gramophone::v1::StyleTransferService::NewStub(channel);
  const grpc::Status status = stylize(*service, call, args);
  if (status.ok()) return 0;
  std::cerr << "stylize: " << status.error_message() << " (code " << status.error_code() << reason(status) << ")\n";
  return interrupted ? 130 : 1;
} catch (const std::exception& error) {
  std::cerr << "stylize: " << error.what() << "\n";
  return 1;
}
