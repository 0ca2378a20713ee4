require "sidekiq"
require "sidekiq/web"
Sidekiq.configure_client { |config| config.redis = { url: ENV.fetch("REDIS_URL") } }
use Rack::Session::Cookie, secret: "x" * 64, same_site: true
run Sidekiq::Web
